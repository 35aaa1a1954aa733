# clientproxy: `make` alone lists the targets. GNU make.
#
#   make demo | test | soak       run with $(PYTHON), or, where that has no lxml, in .venv with the newest lxml from PyPI
#   make bench | lint             run in .venv, with what they need from PyPI (bench with $(PYTHON) itself, where one is given)
#   make install | uninstall      DESTDIR, PREFIX, SYSCONFDIR as everywhere; PYTHON, SCOPE and SERVICE_USER below

PYTHON       ?= python3
# Whom `make install` installs for: `system`, all of it, or `user`, a unit of the user's own, run by `systemctl --user`: the default of
# an ordinary user who names neither DESTDIR nor SYSCONFDIR.
SCOPE        ?= $(if $(DESTDIR)$(filter 0,$(WHO))$(filter-out file,$(origin SYSCONFDIR)),system,user)
PREFIX       ?= $(if $(FOR_USER),$(HOME)/.local,/usr/local)
SYSCONFDIR   ?= $(if $(FOR_USER),$(USER_CONFIG),/etc)
BINDIR       ?= $(PREFIX)/bin
# Units of packages have always lived in /lib on Debian; systemd also looks into /usr/local/lib/systemd/system.
UNITDIR      ?= $(if $(FOR_USER),$(USER_CONFIG)/systemd/user,$(if $(filter /usr,$(PREFIX)),,$(PREFIX))/lib/systemd/system)
# Of the SysV script's pid file; systemd knows its own.
RUNSTATEDIR  ?= /run
# The system user that the daemon runs as, made by `make install` where it is missing.
SERVICE_USER ?= clientproxy
# For demo, test, bench and soak: `make test ARGS='-v TestStreamParser'`.
ARGS         ?=

WHO         := $(shell id -u)
FOR_USER     = $(filter user,$(SCOPE))
USER_CONFIG  = $(or $(XDG_CONFIG_HOME),$(HOME)/.config)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test bench soak lint install uninstall clean FORCE

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: PYTHON=$(PYTHON)  ARGS=$(ARGS)"
	@echo "           SCOPE=$(SCOPE)  DESTDIR=$(DESTDIR)  PREFIX=$(PREFIX)  SYSCONFDIR=$(SYSCONFDIR)  SERVICE_USER=$(SERVICE_USER)"

# --- Running it ---------------------------------------------------------------------------------------------------------------

# What $(PYTHON) is, such as /usr-3.11, and behind that True where its lxml is new enough.
FOUND     := $(shell $(PYTHON) -c 'import sys; print(sys.base_prefix + "-%d.%d" % sys.version_info[:2]); \
    from lxml import etree; print(etree.LXML_VERSION >= (4, 6))' 2>/dev/null)
IDENTITY  := $(firstword $(FOUND))
HAS_LXML  := $(filter True,$(FOUND))
# Whether PYTHON was named, by the command line or the environment.
NAMED      = $(filter-out file,$(origin PYTHON))

# PY runs what needs no more than lxml.
PY         = $(if $(HAS_LXML),$(PYTHON),.venv/bin/python)
NEEDED     = $(if $(HAS_LXML),,.venv/lxml)
# Another Python that was named is measured as it is, and without slixmpp where it has none.
BENCH_PY   = $(if $(NAMED),$(PY),.venv/bin/python)

demo: $(NEEDED)  ## watch it work: a loopback server, the real daemon, the four stanzas
	@$(PY) test_clientproxy.py demo $(ARGS)

test: $(NEEDED)  ## all tests; what was skipped, and why, is said at the end
	@$(PY) test_clientproxy.py $(ARGS)

soak: $(NEEDED)  ## 10 million stanzas, 1 % of them hostile, with flat memory (takes long)
	@$(PY) test_clientproxy.py soak $(ARGS)

bench: $(if $(NAMED),$(NEEDED),.venv/dev)  ## CPU time per round trip, beside slixmpp and the parser alone; also ARGS=--growth
	@$(BENCH_PY) test_clientproxy.py bench $(ARGS)

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

# The virtual environment, with lxml (the newest) or with everything. It is of one Python: another $(PYTHON) makes it anew. The marker is
# written last: a broken one is set up again. The linters are pinned: a rule that is new tomorrow must not fail a tree that is right
# today.
.venv/lxml: PACKAGES = lxml
.venv/dev: PACKAGES = lxml slixmpp lxml-stubs==0.5.* mypy==2.4.* ruff==0.17.* vermin==1.9.*
.venv/lxml .venv/dev: Makefile $(if $(filter $(IDENTITY),$(shell cat .venv/made-from 2>/dev/null)),,FORCE)
	@[ -n '$(IDENTITY)' ] || { echo "PYTHON=$(PYTHON): no such Python" >&2; exit 1; }
	@echo "setting up .venv, of $(PYTHON), with $(PACKAGES) from PyPI" >&2
	@{ [ "$$(cat .venv/made-from)" = '$(IDENTITY)' ] && .venv/bin/python -m pip --version; } >/dev/null 2>&1 || \
	    { $(PYTHON) -m venv --clear .venv && echo '$(IDENTITY)' >.venv/made-from; }
	@.venv/bin/python -m pip install -qq --disable-pip-version-check $(foreach p,$(PACKAGES),'$(p)')
	@touch $@

clean:  ## remove the virtual environment and all caches
	rm -rf .venv .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- Installing it ------------------------------------------------------------------------------------------------------------

PROGRAM    = $(BINDIR)/clientproxy.py
CONFIG     = $(SYSCONFDIR)/clientproxy.conf
UNIT       = $(UNITDIR)/clientproxy.service
INITSCRIPT = $(SYSCONFDIR)/init.d/clientproxy

# The texts below are written as they stand, but for these words. $(value) keeps make from reading their `$`; only a backslash at the end
# of a line would not survive.
fill = $(subst @PROGRAM@,$(PROGRAM),$(subst @CONFIG@,$(CONFIG),$(subst @USER@,$(SERVICE_USER),$(subst @RUN@,$(RUNSTATEDIR),$(1)))))
define newline


endef
SYSTEM_UNIT = $(value UNIT_OF_BOTH)$(newline)$(value UNIT_OF_SYSTEM)
USER_UNIT   = $(value UNIT_OF_BOTH)$(newline)$(value UNIT_OF_USER)
install: export UNIT_TEXT = $(call fill,$(if $(FOR_USER),$(USER_UNIT),$(SYSTEM_UNIT)))
install: export INIT_TEXT = $(call fill,$(value SYSV_SCRIPT))
install: export CHECK = $(value PYTHON_CHECK)

# The interpreter of the first line, absolute; links are kept as they are, since a virtual environment's python is one. Where none was
# named it is the one that services find, not that of the shell in which make runs. For another system's files (DESTDIR) nothing here
# can be checked: without a PYTHON the first line stays.
SERVICE_PATH = /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
SEARCHED     = $(if $(NAMED)$(FOR_USER),,PATH=$(SERVICE_PATH))
CHECKED      = $(or $(NAMED),$(if $(DESTDIR),,yes))
INTERPRETER  = $(if $(CHECKED),$(shell $(SEARCHED) '$(PYTHON)' -c 'import sys; print(sys.executable)' 2>/dev/null))

install:  ## daemon, configuration, systemd unit, SysV script; run by an ordinary user: for that user alone
	@$(if $(CHECKED),[ -n '$(INTERPRETER)' ] || { echo "PYTHON=$(PYTHON): no such Python" >&2; exit 1; })
	@$(if $(CHECKED),'$(INTERPRETER)' -c "$$CHECK")
	@$(if $(DESTDIR)$(FOR_USER),:,$(MAKE_USER))
	install -d '$(DESTDIR)$(BINDIR)' '$(DESTDIR)$(SYSCONFDIR)' '$(DESTDIR)$(UNITDIR)' $(if $(FOR_USER),,'$(DESTDIR)$(dir $(INITSCRIPT))')
	install -m 0755 clientproxy.py '$(DESTDIR)$(PROGRAM)'
	$(if $(INTERPRETER),sed -i '1s|^#!.*|#!$(INTERPRETER)|' '$(DESTDIR)$(PROGRAM)',@echo "its first line stays; PYTHON= would replace it")
	@printf '%s\n' "$$UNIT_TEXT" >'$(DESTDIR)$(UNIT)'
	chmod 0644 '$(DESTDIR)$(UNIT)'
	$(if $(FOR_USER),,@printf '%s\n' "$$INIT_TEXT" >'$(DESTDIR)$(INITSCRIPT)')
	$(if $(FOR_USER),,chmod 0755 '$(DESTDIR)$(INITSCRIPT)')
	@if [ -e '$(DESTDIR)$(CONFIG)' ] || [ -L '$(DESTDIR)$(CONFIG)' ]; then echo "kept as it is: $(DESTDIR)$(CONFIG)"; \
	else echo "new: $(DESTDIR)$(CONFIG)"; $(PUT_CONFIG); fi
	@$(if $(DESTDIR),:,$(if $(FOR_USER),$(NEXT_STEPS_OF_USER),$(NEXT_STEPS)))

define PYTHON_CHECK
import sys
name = "%s (Python %d.%d.%d" % ((sys.executable,) + sys.version_info[:3])
if sys.version_info < (3, 9):
    sys.exit(name + "): 3.9 or newer is needed: make install PYTHON=/a/newer/one")
try:
    from lxml import etree
except ImportError:
    sys.exit(name + ") has no lxml: apt-get install python3-lxml, or make install PYTHON=/one/that/has/it")
name += ", lxml " + etree.__version__ + ")"
if etree.LXML_VERSION < (4, 6):
    sys.exit(name + ": lxml 4.6 or newer is needed: make install PYTHON=/one/that/has/it")
print("interpreter: " + name)
endef

# As root only. useradd is the one that every distribution with systemd or sysvinit has (Debian's adduser is a wrapper around it, and
# another program elsewhere).
MAKE_USER = if [ '$(WHO)' = 0 ] && ! getent passwd $(SERVICE_USER) >/dev/null; then \
    echo "new system user: $(SERVICE_USER)"; \
    getent group $(SERVICE_USER) >/dev/null || groupadd --system $(SERVICE_USER); \
    useradd --system --gid $(SERVICE_USER) --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin $(SERVICE_USER); fi
# The daemon may read its configuration, which holds the secret, and not write it.
PUT_CONFIG = install -m $(if $(FOR_USER),0600,0640) \
    $(if $(DESTDIR)$(FOR_USER)$(filter-out 0,$(WHO)),,-o root -g "$$(id -g $(SERVICE_USER))") \
    clientproxy.conf.sample '$(DESTDIR)$(CONFIG)'

# systemd finds a unit by its name in these two places only.
ENABLED = $(if $(filter /usr /usr/local,$(PREFIX)),clientproxy,$(UNIT))
WRITE_CONFIG = echo "Next:"; \
    echo "  1. $(CONFIG): the component's section, target_address, secret; and the same secret in the server's configuration"; \
    echo "  2. $(PROGRAM) -c $(CONFIG) --check"
NEXT_STEPS = { \
    if [ '$(WHO)' = 0 ] && ! runuser -u $(SERVICE_USER) -- '$(INTERPRETER)' -c 'import lxml.etree' 2>/dev/null; then \
        echo "WARNING: the user $(SERVICE_USER) cannot run $(INTERPRETER)"; fi; \
    case '$(INTERPRETER)' in /root/* | /home/* | /tmp/* | /var/tmp/*) \
        echo "WARNING: the systemd unit hides $(INTERPRETER): keep it below /opt, say";; esac; \
    [ '$(WHO)' = 0 ] || echo "Not run by root: there is no user $(SERVICE_USER) yet, and no systemd or init that knows of this."; \
    $(WRITE_CONFIG); \
    echo "  3. systemd:  systemctl daemon-reload && systemctl enable --now $(ENABLED)"; \
    echo "     sysvinit: update-rc.d clientproxy defaults && $(INITSCRIPT) start"; \
    echo "  After an update: systemctl daemon-reload && systemctl restart clientproxy, or $(INITSCRIPT) restart"; }
NEXT_STEPS_OF_USER = { \
    echo "Installed for this user alone: no service of the system, no SysV script (for those run it as root)."; \
    $(WRITE_CONFIG); \
    echo "  3. systemctl --user daemon-reload && systemctl --user enable --now clientproxy"; \
    echo "     loginctl enable-linger (or it ends with your last session)"; \
    echo "  Without systemd: $(PROGRAM) -c $(CONFIG)"; \
    echo "  After an update: systemctl --user daemon-reload && systemctl --user restart clientproxy"; }

uninstall:  ## stop and remove it all but the configuration and the user
	@$(if $(DESTDIR),:,$(if $(FOR_USER),$(STOP_SERVICE_OF_USER),$(STOP_SERVICE)))
	rm -f '$(DESTDIR)$(PROGRAM)' '$(DESTDIR)$(UNIT)' $(if $(FOR_USER),,'$(DESTDIR)$(INITSCRIPT)')
	@echo "left: $(DESTDIR)$(CONFIG)$(if $(DESTDIR)$(FOR_USER),,$(comma) and the user $(SERVICE_USER))"
	@$(if $(DESTDIR),:,echo "Next: $(if $(FOR_USER),systemctl --user daemon-reload,systemctl daemon-reload$(comma) or update-rc.d clientproxy remove)")

comma := ,
# Only the service that this very file started: a second installation under another PREFIX is none of ours.
IS_OURS = [ "$$(systemctl $(1) show --property FragmentPath --value clientproxy.service 2>/dev/null)" -ef '$(UNIT)' ]
STOP_SERVICE_OF_USER = if $(call IS_OURS,--user); then systemctl --user disable --now clientproxy.service; fi
STOP_SERVICE = if $(call IS_OURS,--system); then systemctl disable --now clientproxy.service; \
    elif [ -x '$(INITSCRIPT)' ] && [ ! -d /run/systemd/system ] && [ '$(WHO)' = 0 ]; then '$(INITSCRIPT)' stop; fi

# --- The systemd unit (systemd 252 of Debian 12 or newer, works from 247 on) --------------------------------------------------

# UNIT_OF_BOTH is what the service of the system and that of a user have in common; behind it comes one of the other two.
define UNIT_OF_BOTH
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

Restart=always
RestartSec=2
# EX_CONFIG: a wrong configuration doesn't get better by itself.
RestartPreventExitStatus=78
# The loop itself sends the sign of life; a stuck one is ended by SIGABRT and started again.
WatchdogSec=60
# Must be above `drain` (default 5): raise both together.
TimeoutStopSec=60

# The secret outside the configuration: a file that only root (of a user's own service: the user) can read, read by systemd at each
# start, and `secret_file = $CREDENTIALS_DIRECTORY/secret` in the component's section. A new secret needs a restart, not a reload.
#LoadCredential=secret:/etc/clientproxy.secret

# For `metrics = unix:/run/clientproxy/metrics` (of a user's own service: below $XDG_RUNTIME_DIR).
RuntimeDirectory=clientproxy
# Measured: 8 % less CPU time with small stanzas. lxml frees its pieces in bulk, and malloc then keeps more of them at hand.
Environment=GLIBC_TUNABLES=glibc.malloc.tcache_count=20000
# The last resort: the daemon's own bounds end far below (20 to 40 MB; some hundred for a moment under the worst stanza of 4 MiB).
MemoryMax=1G
# A core dump would hold the secrets.
LimitCORE=0
UMask=0077
endef

define UNIT_OF_USER

[Install]
WantedBy=default.target
endef

define UNIT_OF_SYSTEM

User=@USER@
# With `server = unix:/path`, the group that may connect there:
#SupplementaryGroups=ejabberd

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
    # The log goes through a pipe to logger, which ends with the daemon:
    #
    #     start-stop-daemon -> the daemon --stderr--> $PIDFILE.log --stdin--> logger -> /dev/log
    #
    # A pipe with a name, removed at once, rather than `daemon | logger`: so start-stop-daemon is nobody's child in a pipeline, its exit
    # status is ours, and the number in the pid file is the daemon's own. setsid: neither the end of a terminal nor Ctrl-C in it may end
    # logger before the daemon. JOURNAL_STREAM: the daemon takes the pipe for the journal, writes each line with its severity in front
    # and without a time stamp, as syslog has its own; logger takes the severity off again. A line is of 4096 characters at most.
    rm -f "$PIDFILE" "$PIDFILE.log"
    mkfifo -m 0600 "$PIDFILE.log" || fail 1 "cannot make $PIDFILE.log"
    JOURNAL_STREAM=$(stat -c %d:%i "$PIDFILE.log")
    export JOURNAL_STREAM
    (exec_as_user "$(command -v setsid)" -- logger --prio-prefix --size 16KiB -t clientproxy -p daemon.err \
        <"$PIDFILE.log" >/dev/null 2>&1) &
    set -- --start --quiet --background --no-close --make-pidfile --pidfile "$PIDFILE" --chuid "$RUNAS" --startas "$DAEMON"
    start-stop-daemon "$@" -- -c "$CONFIG" </dev/null >/dev/null 2>"$PIDFILE.log"
    started=$?
    rm -f "$PIDFILE.log"
    # Whatever --check can't see (a metrics address in use) ends the daemon within its first second.
    if [ "$started" = 0 ] && sleep 1 && running; then
        say "started, pid $pid"
        return
    fi
    rm -f "$PIDFILE"
    fail 1 "did not start: its messages are in the syslog"
}

stop() {
    if ! running; then
        rm -f "$PIDFILE"
        say "was not running"
        return
    fi
    stopped=$pid
    for signal in TERM KILL; do
        kill -s "$signal" "$pid" 2>/dev/null
        tenths=$((STOP_SECONDS * 10))
        while running && [ "$tenths" -gt 0 ]; do
            sleep 0.1
            tenths=$((tenths - 1))
        done
        if ! running; then
            rm -f "$PIDFILE"
            say "stopped by SIG$signal, pid $stopped"
            return
        fi
    done
    fail 1 "did not stop, pid $pid"
}

reload() {
    running || fail 1 "not running"
    right_configuration "not reloaded"
    kill -s HUP "$pid"
    say "told to reload, pid $pid: what came of it is in the syslog"
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
