# clientproxy: `make` alone lists the targets. GNU make.
#
#   make demo | test | soak       run with $(PYTHON), or in .venv where that has no lxml
#   make bench | fuzz | lint      run in .venv, with what they need from PyPI
#   make install | uninstall      DESTDIR, PREFIX, SYSCONFDIR as everywhere; PYTHON and SERVICE_USER below

PYTHON       ?= python3
PREFIX       ?= /usr/local
SYSCONFDIR   ?= /etc
BINDIR       ?= $(PREFIX)/bin
# Units of packages have always lived in /lib on Debian; systemd also looks into /usr/local/lib/systemd/system.
UNITDIR      ?= $(if $(filter /usr,$(PREFIX)),/lib/systemd/system,$(PREFIX)/lib/systemd/system)
# Of the SysV script's pid file; systemd knows its own.
RUNSTATEDIR  ?= /run
# The system user that the daemon runs as, made by `make install` where it is missing.
SERVICE_USER ?= clientproxy
# For demo, test, bench, soak and fuzz: `make test ARGS='-v StreamParserTest'`.
ARGS         ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test bench soak fuzz lint install uninstall clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: PYTHON=$(PYTHON)  ARGS=$(ARGS)"
	@echo "           DESTDIR=$(DESTDIR)  PREFIX=$(PREFIX)  SYSCONFDIR=$(SYSCONFDIR)  SERVICE_USER=$(SERVICE_USER)"

# --- Running it ---------------------------------------------------------------------------------------------------------------

# PY runs what needs no more than lxml: $(PYTHON) where that has one that is new enough, else the virtual environment that NEEDED
# sets up.
ifeq ($(shell $(PYTHON) -c 'from lxml import etree; print(etree.LXML_VERSION >= (4, 6))' 2>/dev/null),True)
PY     = $(PYTHON)
NEEDED =
else
PY     = .venv/bin/python
NEEDED = .venv/lxml
endif

demo: $(NEEDED)  ## watch it work: a loopback server, the real daemon, the four stanzas
	@$(PY) test_clientproxy.py demo $(ARGS)

test: $(NEEDED)  ## all tests; those on Prosody and ejabberd skip where these are not installed
	@$(PY) test_clientproxy.py $(ARGS)

soak: $(NEEDED)  ## 10 million stanzas, with flat memory (takes long)
	@$(PY) test_clientproxy.py soak $(ARGS)

bench: .venv/dev  ## CPU time per round trip against slixmpp and against the parser alone
	@.venv/bin/python test_clientproxy.py bench $(ARGS)

fuzz: .venv/dev  ## property-based fuzzing of parser and proxy with hypothesis
	@.venv/bin/python test_clientproxy.py fuzz $(ARGS)

# The rules stand here because the tree has no pyproject.toml (design.md). mypy no longer knows Python 3.9 as a target: it checks for
# 3.10, the oldest it takes, and vermin reads both files for anything that 3.9 lacks. Not asked for: `X | None` for Optional[X]
# (UP007, UP045), which 3.9 takes in annotations only, and contextlib.suppress for every `try: ... except: pass` (SIM105).
RUFF  = ruff check --isolated --output-format concise --line-length 120 --target-version py39
RULES = --select E,W,F,I,B,C4,UP,SIM,RET,PIE,PLE,RUF100 --ignore UP007,UP045,SIM105

lint: .venv/dev  ## ruff, mypy --strict, a check for Python 3.9, shellcheck where it is installed
	.venv/bin/$(RUFF) $(RULES) clientproxy.py test_clientproxy.py
	.venv/bin/mypy --strict --python-version 3.10 clientproxy.py test_clientproxy.py
	.venv/bin/vermin --target=3.9- --violations --no-tips clientproxy.py test_clientproxy.py
	@if command -v shellcheck >/dev/null; then echo shellcheck .ci/run; shellcheck .ci/run; fi

# The virtual environment, with lxml (the newest) or with everything. The marker is written last: a broken one is set up again.
# The linters are pinned: a rule that is new tomorrow must not fail a tree that is right today.
.venv/lxml: PACKAGES = lxml
.venv/dev: PACKAGES = lxml slixmpp hypothesis lxml-stubs==0.5.* mypy==2.4.* ruff==0.17.* vermin==1.9.*
.venv/lxml .venv/dev: Makefile
	@echo "setting up .venv with $(PACKAGES) from PyPI" >&2
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@.venv/bin/python -m pip install -qq --disable-pip-version-check $(foreach p,$(PACKAGES),'$(p)')
	@touch $@

clean:  ## remove the virtual environment and all caches
	rm -rf .venv .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- Installing it ------------------------------------------------------------------------------------------------------------

PROGRAM    = $(BINDIR)/clientproxy.py
CONFIG     = $(SYSCONFDIR)/clientproxy.conf
UNIT       = $(UNITDIR)/clientproxy.service
INITSCRIPT = $(SYSCONFDIR)/init.d/clientproxy

# The two texts below are written as they stand, but for these words. $(value) keeps make from reading their `$`; only a backslash at
# the end of a line would not survive.
fill = $(subst @PROGRAM@,$(PROGRAM),$(subst @CONFIG@,$(CONFIG),$(subst @USER@,$(SERVICE_USER),$(subst @RUN@,$(RUNSTATEDIR),$(1)))))
install: export UNIT_TEXT = $(call fill,$(value SYSTEMD_UNIT))
install: export INIT_TEXT = $(call fill,$(value SYSV_SCRIPT))

# The shebang stays `env python3` unless PYTHON was given: then it names that interpreter by its absolute path, and links are kept
# as they are, since a virtual environment's python is one.
ifneq ($(origin PYTHON),file)
INTERPRETER = $(abspath $(shell command -v '$(PYTHON)' 2>/dev/null))
endif

install:  ## the daemon, a configuration where there is none, the systemd unit, the SysV script
	$(if $(filter-out file,$(origin PYTHON)),@test -x '$(INTERPRETER)' || { echo "PYTHON=$(PYTHON): no such program" >&2; exit 1; })
	@$(if $(DESTDIR),:,$(MAKE_USER))
	install -d '$(DESTDIR)$(BINDIR)' '$(DESTDIR)$(SYSCONFDIR)/init.d' '$(DESTDIR)$(UNITDIR)'
	install -m 0755 clientproxy.py '$(DESTDIR)$(PROGRAM)'
	$(if $(INTERPRETER),sed -i '1s|^#!.*|#!$(INTERPRETER)|' '$(DESTDIR)$(PROGRAM)')
	@printf '%s\n' "$$UNIT_TEXT" >'$(DESTDIR)$(UNIT)'
	chmod 0644 '$(DESTDIR)$(UNIT)'
	@printf '%s\n' "$$INIT_TEXT" >'$(DESTDIR)$(INITSCRIPT)'
	chmod 0755 '$(DESTDIR)$(INITSCRIPT)'
	@if [ -e '$(DESTDIR)$(CONFIG)' ] || [ -L '$(DESTDIR)$(CONFIG)' ]; then echo "kept as it is: $(DESTDIR)$(CONFIG)"; \
	else echo "new: $(DESTDIR)$(CONFIG)"; $(PUT_CONFIG); fi
	@$(if $(DESTDIR),:,$(NEXT_STEPS))

# As root only: an installation into somebody's home needs neither. useradd is the one that every distribution with systemd or
# sysvinit has (Debian's adduser is a wrapper around it, and another program elsewhere).
MAKE_USER = if [ "$$(id -u)" = 0 ] && ! getent passwd $(SERVICE_USER) >/dev/null; then \
    echo "new system user: $(SERVICE_USER)"; \
    getent group $(SERVICE_USER) >/dev/null || groupadd --system $(SERVICE_USER); \
    useradd --system --gid $(SERVICE_USER) --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin $(SERVICE_USER); fi
# The daemon may read its configuration, which holds the secret, and not write it.
PUT_CONFIG = install -m 0640 $(if $(DESTDIR),,$$([ "$$(id -u)" = 0 ] && echo -o root -g "$$(id -g $(SERVICE_USER))")) \
    clientproxy.conf.sample '$(DESTDIR)$(CONFIG)'

# systemd finds a unit by its name in these two places only.
ENABLED = $(if $(filter /usr /usr/local,$(PREFIX)),clientproxy,$(UNIT))
# The daemon runs with the PATH that systemd and the SysV script give it, not with that of the shell in which make runs.
NEXT_STEPS = { \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin; \
    $(or $(INTERPRETER),python3) -c 'import lxml.etree' 2>/dev/null || \
        echo "WARNING: no lxml for $(or $(INTERPRETER),the python3 of services): apt-get install python3-lxml, or PYTHON=/one/that/has/it"; \
    echo "Next:"; \
    echo "  1. $(CONFIG): the component's section, target_address, secret; and the same secret in the server's configuration"; \
    echo "  2. $(PROGRAM) -c $(CONFIG) --check"; \
    echo "  3. systemd:  systemctl daemon-reload && systemctl enable --now $(ENABLED)"; \
    echo "     sysvinit: update-rc.d clientproxy defaults && $(INITSCRIPT) start"; \
    echo "  After an update: systemctl daemon-reload && systemctl restart clientproxy, or $(INITSCRIPT) restart"; }

uninstall:  ## stop and remove it all but the configuration and the user
	@$(if $(DESTDIR),:,$(STOP_SERVICE))
	rm -f '$(DESTDIR)$(PROGRAM)' '$(DESTDIR)$(UNIT)' '$(DESTDIR)$(INITSCRIPT)'
	@echo "left: $(DESTDIR)$(CONFIG)$(if $(DESTDIR),, and the user $(SERVICE_USER))"
	@$(if $(DESTDIR),:,echo "Next: systemctl daemon-reload$(comma) or update-rc.d clientproxy remove")

comma := ,
# Only the service that this very file started: a second installation under another PREFIX is none of ours.
STOP_SERVICE = if [ "$$(systemctl show --property FragmentPath --value clientproxy.service 2>/dev/null)" -ef '$(UNIT)' ]; then \
    systemctl disable --now clientproxy.service; \
    elif [ -x '$(INITSCRIPT)' ] && [ ! -d /run/systemd/system ] && [ "$$(id -u)" = 0 ]; then '$(INITSCRIPT)' stop; fi

# --- The systemd unit (systemd 252 of Debian 12 or newer, works from 247 on) --------------------------------------------------

define SYSTEMD_UNIT
[Unit]
Description=clientproxy: XMPP component (XEP-0114) that proxies IQ requests to one client
# Only an order, no need: it reconnects for ever. At shutdown it makes the drain's last answers arrive while the server still runs.
After=network.target nss-lookup.target prosody.service ejabberd.service openfire.service
# ... and so must systemd: never give up restarting.
StartLimitIntervalSec=0

[Service]
# READY when every component is ready or has been tried once: each address of a server may take its 5 + 15 seconds.
Type=notify
NotifyAccess=main
TimeoutStartSec=5min
ExecStart=@PROGRAM@ -c @CONFIG@
ExecReload=/bin/kill -HUP $MAINPID
User=@USER@
# With `server = unix:/path`, the group that may connect there:
#SupplementaryGroups=ejabberd

Restart=always
RestartSec=2
# EX_CONFIG: a wrong configuration doesn't get better by itself.
RestartPreventExitStatus=78
# The loop itself sends the sign of life; a stuck one is ended by SIGABRT and started again.
WatchdogSec=60
# Must be above `drain` (default 5): raise both together.
TimeoutStopSec=60

# The secret outside the configuration: a file root:root 0600, read by systemd at each start, and
# `secret_file = $CREDENTIALS_DIRECTORY/secret` in the component's section. A new secret needs a restart, not a reload.
#LoadCredential=secret:/etc/clientproxy.secret

# For `metrics = unix:/run/clientproxy/metrics`.
RuntimeDirectory=clientproxy
# Measured: 8 % less CPU time with small stanzas. lxml frees its pieces in bulk, and malloc then keeps more of them at hand.
Environment=GLIBC_TUNABLES=glibc.malloc.tcache_count=20000
# The last resort: the daemon's own bounds end far below (20 to 40 MB; some hundred for a moment under the worst stanza of 4 MiB).
MemoryMax=1G
# A core dump would hold the secrets.
LimitCORE=0

# Nothing but the network, its configuration and /run/clientproxy. The daemon reads /proc/self/statm, which ProcSubset=pid keeps.
AmbientCapabilities=
CapabilityBoundingSet=
LockPersonality=yes
MemoryDenyWriteExecute=yes
NoNewPrivileges=yes
PrivateDevices=yes
PrivateTmp=yes
ProcSubset=pid
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProtectSystem=strict
RemoveIPC=yes
# AF_UNIX: sd_notify, the journal, `unix:` addresses
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
UMask=0077

[Install]
WantedBy=multi-user.target
endef

# --- The SysV init script (Debian and its kin: start-stop-daemon of dpkg, setsid of util-linux) ------

define SYSV_SCRIPT
#!/bin/sh
### BEGIN INIT INFO
# Provides:          clientproxy
# Required-Start:    $remote_fs $network $syslog
# Required-Stop:     $remote_fs $network $syslog
# Should-Start:      $named prosody ejabberd openfire
# Should-Stop:       $named prosody ejabberd openfire
# Default-Start:     2 3 4 5
# Default-Stop:      0 1 6
# Short-Description: XMPP component that proxies IQ requests to one client
# Description:       clientproxy connects to an XMPP server as external component (XEP-0114) and
#                    passes IQ requests on to the resources of one client account.
### END INIT INFO

# Exit statuses follow the LSB: 0 done (also: already so), 1 failed, 2 usage, 4 not root, 5 not installed, 6 wrong configuration;
# for status 0 running, 1 dead with a pid file left, 3 stopped.

PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
DAEMON=@PROGRAM@
CONFIG=@CONFIG@
RUNAS=@USER@
PIDFILE=@RUN@/clientproxy.pid
RUNDIR=@RUN@/clientproxy
# Seconds from TERM to KILL: must be above `drain` (default 5), raise both together.
STOP_SECONDS=60

# Measured: 8 % less CPU time with small stanzas. lxml frees its pieces in bulk, and malloc then keeps more of them at hand.
export GLIBC_TUNABLES=glibc.malloc.tcache_count=20000

# Where systemd runs, Debian's functions hand the command over to it, so that there is one daemon and not two.
if [ -r /lib/lsb/init-functions ]; then
    # shellcheck source=/dev/null
    . /lib/lsb/init-functions
fi

say() { echo "clientproxy: $*"; }

fail() {  # exit status, message
    say "$2" >&2
    exit "$1"
}

# Sets pid. After a crash that number may by now belong to another program, hence the look at the command line, which says more than the
# process's name, which may be python3, and than kill -0, which takes a zombie for a process.
running() { pid=$(cat "$PIDFILE" 2>/dev/null) && grep -qsF -- "$DAEMON" "/proc/$pid/cmdline"; }

needed() {  # for all but status; sets group
    [ "$(id -u)" = 0 ] || fail 4 "$1 must be run as root"
    [ -x "$DAEMON" ] || fail 5 "$DAEMON is not installed"
    group=$(id -g "$RUNAS" 2>/dev/null) || fail 5 "no user $RUNAS: useradd --system --user-group --shell /usr/sbin/nologin $RUNAS"
}

# Runs a program as the daemon's user, by start-stop-daemon, as the daemon itself will be: so what that user may not read or execute is
# found by configtest. (setpriv lets root's rights find the program; runuser opens a PAM session.) There is no such pid file, ever.
exec_as_user() { exec start-stop-daemon --start --quiet --chuid "$RUNAS" --pidfile "$PIDFILE.none" --startas "$@"; }

# The daemon's own status is 78 for mistakes.
configtest() { (exec_as_user "$DAEMON" -- -c "$CONFIG" --check </dev/null); }

right_configuration() {  # or a message, with every mistake
    checked=$(configtest 2>&1) || fail 6 "$1, the configuration is wrong:
$checked"
}

start() {
    if running; then
        say "already running, pid $pid"
        return
    fi
    right_configuration "not started"
    # /run is empty after each boot; a socket for metrics may lie in here.
    install -d -o "$RUNAS" -g "$group" -m 0755 "$RUNDIR"
    # The log goes through a pipe to logger, which ends with the daemon. A pipe with a name, removed at once, rather than `daemon |
    # logger`: so start-stop-daemon is nobody's child in a pipeline, its exit status is ours, and the number in the pid file is the
    # daemon's own. setsid: neither the end of a terminal nor Ctrl-C in it may end logger before the daemon.
    rm -f "$PIDFILE" "$PIDFILE.log"
    mkfifo -m 0600 "$PIDFILE.log" || fail 1 "cannot make $PIDFILE.log"
    (exec_as_user "$(command -v setsid)" -- logger -t clientproxy -p daemon.info <"$PIDFILE.log" >/dev/null 2>&1) &
    set -- --start --quiet --background --no-close --make-pidfile --pidfile "$PIDFILE" --chuid "$RUNAS" --startas "$DAEMON"
    start-stop-daemon "$@" -- -c "$CONFIG" </dev/null >/dev/null 2>"$PIDFILE.log"
    started=$?
    rm -f "$PIDFILE.log"
    # Whatever --check can't see (a metrics address in use) ends the daemon within its first second.
    [ "$started" = 0 ] && sleep 1 && running && return
    rm -f "$PIDFILE"
    fail 1 "did not start: its messages are in the syslog"
}

stop() {
    running || { rm -f "$PIDFILE"; return; }
    for signal in TERM KILL; do
        kill -s "$signal" "$pid" 2>/dev/null
        tenths=$((STOP_SECONDS * 10))
        while running && [ "$tenths" -gt 0 ]; do
            sleep 0.1
            tenths=$((tenths - 1))
        done
        running || { rm -f "$PIDFILE"; return; }
    done
    fail 1 "did not stop, pid $pid"
}

reload() {
    running || fail 1 "not running"
    right_configuration "not reloaded"
    kill -s HUP "$pid"
}

status() {
    if running; then
        say "running, pid $pid"
    elif [ -e "$PIDFILE" ]; then
        say "dead, but $PIDFILE exists"
        return 1
    else
        say "stopped"
        return 3
    fi
}

case "$1" in
    start)
        needed start
        start
        ;;
    stop)
        needed stop
        stop
        ;;
    restart)
        needed restart
        # First, so that a wrong configuration leaves the running daemon alone.
        right_configuration "not restarted"
        stop
        start
        ;;
    reload|force-reload)
        needed reload
        reload
        ;;
    configtest)
        needed configtest
        configtest
        ;;
    status)
        status
        ;;
    *)
        echo "Usage: $0 {start|stop|restart|reload|force-reload|status|configtest}" >&2
        exit 2
        ;;
esac
endef
