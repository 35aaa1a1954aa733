#!/usr/bin/env python3
"""clientproxy: a service that lives in an XMPP client, reached through a component.

An IQ request to the component is handed to one resource of an ordinary account; the answer goes back
to the requester from the address that was asked:

    requester                   component (this daemon)                 implementing client
    ---------                   -----------------------                 -------------------
    get  id=1234 ------------>  choose a resource, encode the sender
      from user@d/abc           get  id=1234  ----------------------->  from proxy.d/user@d/abc
      to   proxy.d                                                      to   some-user@d/a
                                look up the open request  <-----------  result id=1234
    result id=1234 <----------  restore both addresses                  from some-user@d/a
      from proxy.d                                                      to   proxy.d/user@d/abc
      to   user@d/abc

Words:
    JAT           Jabber Address Translation: the exchange of addresses in the picture.
    encoded-from  the resource of the component's address that stands for a requester.
    requester     the full JID that asks; user: its bare JID, for which limits count.
    target        the bare JID of the account that serves; the programs that are logged in to it are the
                  implementing client; each of its full JIDs is a resource.
    open request  one that was taken and has no answer yet. Where `hold` is configured, it may wait for a resource.
    backlog       answers, and relayed messages, that could not be sent, because there was no stream.
    relay         to pass on all else: messages, presence, and the target's own requests to a user. The target
                  addresses that user as proxy.d/encoded-from.

The idea and these terms are those of Prosody's mod_client_proxy; this program needs of a server no more than
XEP-0114, which all of them have. Implemented: XEP-0114 §3 (handshake); of RFC 6120 §4 streams, §4.9.3 stream errors,
§8.1 attributes and §8.2.3 rules of IQs, §8.3.3 stanza errors, §11.1 restricted XML, §13.12 size limits; of RFC 6121
§3 subscriptions and §4 presence; XEP-0199 as a sign of life. Deliberately not: SASL and resource binding (a component
has none), service discovery (the implementing client answers it), rosters, archives and blocking (the server's).

The objects, each owned by the one above or to the left of it, and the threads that run them:

    main, signal thread    start one loop thread after the other; hand the signals to it
    loop thread            Daemon        reload, stop, the end of the thread when lxml's memory has grown
                            |- Loop      the selector, the clock, what other threads hand back
                            |- Monitor   accepts HTTP clients
                            `- Connection ----- one of a component: the pause, the dial, the stream, its end
                                |- ComponentStream    XEP-0114 as a table
                                |   `- StreamParser   bytes to stanzas and back (all of lxml)
                                `- Proxy              the rules; the next connection goes on with it
                                    |- Target         the resources, as one stream knows them; the policies
                                    |- OpenRequests, Codec      the JAT tables
                                    `- the backlog, Figures     kept also when the Proxy is replaced
    dial threads           one for each attempt: look-up, connect, TLS; hands back a socket or a text
    reload threads         read the configuration file; hand it back
    HTTP threads           one for each reply of the Monitor

Read from top to bottom. Up to the configuration nothing opens a socket, reads a clock or writes a log: a Clock
is handed in, whose `now` the loop sets, and a function `say(level, template, *arguments)` for the log.
"""

import sys

if sys.version_info < (3, 9):  # noqa: UP036
    sys.stderr.write(f"clientproxy: {sys.executable} is Python {sys.version.split()[0]}; 3.9 or newer is needed\n")
    sys.exit(78)

import argparse
import codecs
import collections
import configparser
import contextlib
import errno
import fnmatch
import functools
import gc
import hashlib
import itertools
import logging
import os
import random
import re
import selectors
import signal
import socket
import ssl
import stat
import threading
import time
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from encodings.idna import nameprep
from enum import Enum
from typing import Annotated, Any, Callable, NamedTuple, NoReturn, Optional
from xml.parsers import expat

try:
    from lxml import etree
except ImportError as missing:
    sys.stderr.write(f"clientproxy: {sys.executable} has no lxml ({missing}): apt-get install python3-lxml, "
                     f"or {sys.executable} -m pip install lxml\n")  # fmt: skip
    sys.exit(78)

__version__ = "1.1"

# ------------------------------------------------------------------------------------ constants

NS_COMPONENT = "jabber:component:accept"
NS_CLIENT = "jabber:client"  # jabberd2 writes every stanza to a component in it
NS_STREAM = "http://etherx.jabber.org/streams"
NS_STREAM_ERRORS = "urn:ietf:params:xml:ns:xmpp-streams"
NS_STANZA_ERRORS = "urn:ietf:params:xml:ns:xmpp-stanzas"
NS_XML = "http://www.w3.org/XML/1998/namespace"
XML_LANG = f"{{{NS_XML}}}lang"

STREAM = f"{{{NS_STREAM}}}stream"
STANZAS = {f"{{{ns}}}{name}": name for ns in (NS_COMPONENT, NS_CLIENT) for name in ("iq", "message", "presence")}
TOP_LEVEL = {*STANZAS, f"{{{NS_STREAM}}}error", f"{{{NS_STREAM}}}features", f"{{{NS_COMPONENT}}}handshake"}

NEVER = float("inf")
PING_ID = "alive"  # of our own pings, which go through the server back to us

# Sizes, in bytes where nothing else is said.
TLS_RECORD = 16384  # RFC 8446 §5.1
READ_SIZE = 65536  # larger reads make the parser slower
MAX_HEADER = 65536  # of the server's stream header
MAX_PART = 1023  # of each part of a JID, RFC 7622 §3
MAX_DEPTH = 200_000  # nested elements
BUDGET = 16 << 20  # for each kind of thing that is kept for users, see Budget
MAX_RESOURCES = 10_000  # resources of one target that are known at a time
MAX_STICKY = 65_536  # requesters whose resource is remembered
PAUSE_READING = 1 << 20  # waiting output at which no more is read from that server
LONG_STANZA = 256 << 10  # of an unfinished stanza: with more of it there, it is parsed, and no longer put off
LEAST_LIMIT = 10_000  # no server may refuse smaller stanzas, RFC 6120 §13.12
RECENT_BYTES = 4 << 20  # last bytes sent in which a stanza over the server's limit is looked for
BURST = 500  # timeouts, or waiting requests, that are handled in one turn of the loop
HTTP_CLIENTS, HTTP_REQUEST = 32, 8192  # at a time; bytes of one
REQUEST_MEMORY = 2048  # what an open request takes of the process's memory: an estimate
MEMORY_HEADROOM = 24 << 20  # growth of the process's memory at which the parsers are renewed

# Times in seconds.
GRACE = 3.0  # of a new stream, in which presence may still be under way
ASK_AGAIN_MAX = 300.0  # between two rounds of probe and subscribe
LOSS_PROBE_AFTER, LOSS_PROBE_EVERY = 1.0, 10.0  # after a resource has gone
STALE_CHECK_EVERY, STALE_CHECK_FOR = 60.0, 10.0  # between two stale checks (see Target); for the answer to one
LEAVING_WITHIN = 1.0  # after service-unavailable: a resource that was leaving has left by then
BACKLOG_KEPT = 600.0  # answers wait so long for the next stream
LOG_RARELY = 60.0  # between two log lines about one thing that users can cause
REPORT_AFTER = 1.0  # a change of the resources is logged, with what else has changed by then
HEADER_ERROR_WITHIN = 2.0  # for the stream error that may follow a faulty header
PING_WITHIN = 60.0  # for the server's answer
CONNECT_WITHIN, HANDSHAKE_WITHIN = 5.0, 15.0
STALL = 60.0  # without a byte taken by the server while output waits
LINGER = 1.0  # for the server's end of the stream, after our own
STEADY = 60.0  # that a stream must have been ready for the pauses to begin again at 1 s
RECENT = 1.0  # before a stream error, in which a stanza over the server's limit was sent
TURN = 0.05  # of the loop, before it looks at what is late
HOUSEKEEPING = 1.0  # between two signs of life to the service manager; with each the memory is looked at
ANNOUNCE_WITHIN = 20.0  # the service manager hears that we have started, though an attempt still hangs
HTTP_WITHIN = 5.0

TIMEOUTS_SUSPECT = 3  # timeouts in a row after which a resource is the last choice
MAX_NAMESPACES = 1000  # declared at a time, for libxml2 before 2.12, which looks through all at each use
SECOND_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

Element = etree._Element
Attributes = Any  # of an lxml element; its keys may be bytes, which saves encoding them each time
React = Callable[[Element], Optional[bool]]  # what is done with an element; True: it is to be sent on
Say = Callable[..., None]
bytes_of: Any = functools.partial(etree.tostring, encoding="utf-8", with_tail=False)  # of a stanza, but not its tail
RequestKey = tuple[str, str]  # of an open request: where its answer will be addressed to, and the id there


class Clock:
    """What time it is, for all objects of one loop."""

    now = 0.0  # seconds of a monotonic clock, set by the loop alone


# ------------------------------------------------------- addresses (RFC 7622) and errors (RFC 6120)

# The conditions that this daemon answers with: type (RFC 6120 §8.3.3) and text.
CONDITIONS = {
    "bad-request": ("modify", "A request needs a known type, an id and exactly one payload element."),
    "conflict": ("cancel", "A request with this id is still open."),
    "feature-not-implemented": ("cancel", "This component takes no messages here."),
    "forbidden": ("auth", "This component does not serve this address."),
    "item-not-found": ("cancel", "This address stands for nobody."),
    "not-allowed": ("cancel", "This address must not ask this component."),
    "policy-violation": ("modify", "The stanza is too large, or cannot be carried."),
    "recipient-unavailable": ("wait", "The service has gone, or is just starting."),
    "remote-server-timeout": ("wait", "The service has not answered in time."),
    "resource-constraint": ("wait", "Too many requests are open."),
    "service-unavailable": ("cancel", "Nobody serves this component at present."),
}

# Stream errors that mean that the server's or this daemon's configuration is wrong, with the remedy.
REFUSALS = {
    "not-authorized": "the server refused the secret: make `secret` the same as the server's (component_secret in "
    "Prosody, password of the ejabberd_service listener); ejabberd says so for a name that is not under `hosts`, too",
    "host-unknown": "the server does not know this component: add it to the server's configuration (Component in "
    "Prosody, hosts of the ejabberd_service listener) or correct the section's name",
    "conflict": "another connection serves this component: stop the other daemon, or leave this one waiting "
    "as its standby; or the name is that of a virtual host of the server: choose another",
}

# Stream errors that no stanza causes; '' is a broken connection. Any other error a remote user may have caused, who
# must not be able to stretch the pauses: so once a stream was ready, they grow only after one of these.
CONNECTION_FAULTS = ("", "connection-timeout", "host-gone", "remote-connection-failed", "reset", "resource-constraint",
                     "see-other-host", "system-shutdown", "undefined-condition")  # fmt: skip

# A localpart, without what RFC 7622 §3.3 forbids in it, and a label of a domain.
_LOCALPART = r"[^\s\"&'/:<>@\x00-\x20\x7f\ufffe\uffff]+"
_LABEL = r"[^\s\"&'/:<>@\\(),;\[\]\x00-\x20\x7f\ufffe\uffff.]+"
_JID = re.compile(rf"({_LOCALPART}@)?{_LABEL}(\.{_LABEL})*(/.+)?", re.DOTALL)


def split_jid(jid: str) -> tuple[str, str, str]:
    """Return localpart, domainpart and resourcepart of a JID, each '' where absent (RFC 7622 §3.1)."""
    bare, _, resource = jid.partition("/")
    local, at, domain = bare.partition("@")
    return (local, domain, resource) if at else ("", bare, resource)


def is_jid(text: str) -> bool:
    """Whether a text has the form of a JID: [localpart@]domainpart[/resourcepart]."""
    fits = all(len(part.encode()) <= MAX_PART for part in split_jid(text))
    return fits and _JID.fullmatch(text) is not None


def is_prepared(jid: str) -> bool:
    """Whether a bare JID is what nameprep makes of it (RFC 3491), so that every server spells it the same."""
    with contextlib.suppress(UnicodeError):  # a character that it forbids
        return all(nameprep(part) == part for part in split_jid(jid)[:2])
    return False


def form_of(jid: str) -> str:
    """Return the NFKC form of a JID. What is too long for a JID stays: its form can cost more than linear time."""
    return unicodedata.normalize("NFKC", jid) if len(jid.encode()) <= 3 * MAX_PART + len("@/") else jid


_ESCAPES = str.maketrans({
    "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&apos;", "\n": "&#10;", "\r": "&#13;", "\t": "&#9;",
})  # fmt: skip


def escaped(text: str) -> str:
    """Return a text as it may stand in an attribute (xml.sax.saxutils would bring in urllib: 60 ms, 4 MB)."""
    return text.translate(_ESCAPES)


def build_stanza(name: str, attributes: dict[str, Optional[str]], content: str = "") -> bytes:
    """Return a stanza of the daemon's own; attributes of value None are left out, content is XML."""
    head = "".join(f" {key}='{escaped(value)}'" for key, value in attributes.items() if value is not None)
    return f"<{name}{head}>{content}</{name}>".encode()


def error_stanza(name: str, condition: str, by: str, to: str, from_: str, id_: Optional[str]) -> bytes:
    """Return a stanza of type error with a condition of CONDITIONS; by: who says so (RFC 6120 §8.3.2)."""
    kind, text = CONDITIONS[condition]
    error = (
        f"<error type='{kind}' by='{escaped(by)}'><{condition} xmlns='{NS_STANZA_ERRORS}'/>"
        f"<text xmlns='{NS_STANZA_ERRORS}' xml:lang='en'>{text}</text></error>"
    )
    return build_stanza(name, {"type": "error", "id": id_, "from": from_, "to": to}, error)


def condition_of(element: Element, path: str = f"{{*}}error/{{{NS_STANZA_ERRORS}}}*") -> str:
    """Return the name of an error's condition, or ''; path: to it, by default in a stanza (RFC 6120 §8.3.2)."""
    names = (str(child.tag).rpartition("}")[2] for child in element.iterfind(path))
    return next((name for name in names if name != "text"), "")


def describe(element: Element) -> str:
    """Return the start of a stanza for the log: its name and addresses, never its payload."""
    name = str(element.tag).rpartition("}")[2]
    given = ((key, element.get(key)) for key in ("type", "id", "from", "to"))
    return " ".join([name, *(f"{key}={value[:200]!r}" for key, value in given if value)])[:800]


def count_of(number: int, one_thing: str, things: str) -> str:
    """Return a number with its noun in the right form."""
    return f"{number} {one_thing if number == 1 else things}"


class Budget:
    """Counts bytes that are kept for users: at most BUDGET, a sixteenth of it for one bare JID.

    There is one for each kind: the long texts of open requests, their stanzas, the tokens of a Codec, the backlog.
    """

    def __init__(self) -> None:
        self.used = 0
        self._users: collections.Counter[str] = collections.Counter()

    def add(self, user: str, size: int) -> bool:
        """Count bytes of a bare JID, if they fit in; with a negative size give back what was counted."""
        total = self._users[user] + size
        if size > 0 and (total > BUDGET // 16 or self.used + size > BUDGET):
            return False
        self.used += size
        self._users[user] = total
        if not total:
            del self._users[user]
        return True


# ------------------------------------------------------------------------- the stream's XML (lxml)


class Fault(NamedTuple):
    """Why a stream cannot go on: a condition of RFC 6120 §4.9.3, an explanation, who caused it."""

    condition: str  # '': no stream error, the connection has ended or did not come about
    detail: str
    sender: str = ""  # of the stanza at fault, as far as it is known
    of_server: bool = False  # the server has sent it

    def __str__(self) -> str:
        """Say why a stream has ended, and what to change."""
        detail = self.detail
        if self.of_server:
            text = f"; the server says: {detail}" if detail else ""
            detail = REFUSALS.get(self.condition, "the server ended the stream") + text
        said = f"{self.condition}: {detail}" if self.condition else detail
        return said + (f" (in a stanza of {self.sender[:400]})" if self.sender else "")


class Unacceptable(Exception):
    """What expat would take and a stream must not hold; the arguments are those of a Fault."""


# expat knows the names of XML's 4th edition only, lxml those of the 5th. So expat must not judge them, but lxml. To
# expat the stream is in an encoding of our own: each byte above ASCII is a letter, and letters may stand in every
# name. Byte 0xNN is U+9DNN, a Chinese letter that is hardly ever written. text_of() undoes that.
_MAP = "".join(map(chr, (*range(128), *range(0x9D80, 0x9E00))))  # the letter of each byte
_CODEC = codecs.CodecInfo(codecs.ascii_encode, lambda data, errors="strict": codecs.charmap_decode(data, errors, _MAP))
codecs.register({"clientproxyletters": _CODEC}.get)


def text_of(letters: str) -> str:
    """Return the text that such letters stand for. Other characters, which were references such as &#233;, stay."""
    if letters.isascii():
        return letters
    # The low bytes of a run of letters are the UTF-8 that was read; UTF-16-LE has them in every other place.
    text = re.sub("[\u9d80-\u9dff]+", lambda run: run[0].encode("utf-16-le")[::2].decode("utf-8", "replace"), letters)
    return re.sub("[\ufffe\uffff]", "\ufffd", text)  # which are not allowed in XML


_SLOW_LOOK_UP = etree.LIBXML_VERSION < (2, 12)
# libxml2 2.9 writes the names of namespaces as they are: what had &amp; or &lt; in one is then wrong.
_RAW_NAMESPACES = b"&amp;" not in etree.tostring(etree.fromstring("<a xmlns='urn:&amp;'/>"))
_ESCAPE_IN_NAMESPACE = re.compile(rb"""xmlns(?::[^\s=<>"':]*)?\s*=\s*(?:"[^"&<]*&|'[^'&<]*&)""")
_BEGIN = f"<stream:stream xmlns='{NS_COMPONENT}' xmlns:stream='{NS_STREAM}'>".encode()
_START_TAG = re.compile(rb"""<([^\s"'<>/?!]+)(?=[\s/>])[^"'<>]*(?:(?:"[^"<]*"|'[^'<]*')[^"'<>]*)*>""")


def flaw_of(document: bytes) -> Optional[str]:
    """Return why lxml cannot be trusted with a document's namespaces: '' if it can, None if they are ill-formed."""
    flaws: list[str] = [""]
    scope: list[object] = []

    def declared(prefix: Optional[str], name: Optional[str]) -> None:
        scope.append(prefix)
        if len(scope) > MAX_NAMESPACES:
            flaws.append(f"more than {MAX_NAMESPACES} namespaces are declared at a time")
        if _RAW_NAMESPACES and any(char in (name or "") for char in "&<\n\r\t"):
            flaws.append("this libxml2 cannot write one of its namespaces")

    encoding = "utf-8" if document.isascii() else "clientproxyletters"  # which takes longer
    parser = expat.ParserCreate(encoding, namespace_separator="\f")
    if _SLOW_LOOK_UP:  # a newer libxml2 has neither flaw
        parser.StartNamespaceDeclHandler, parser.EndNamespaceDeclHandler = declared, lambda prefix: scope.pop()
    try:
        parser.Parse(document, True)
    except expat.ExpatError as error:
        return "it binds a reserved namespace" if "reserved namespace" in str(error) else None
    return flaws[-1]


class Frame(NamedTuple):
    """An element of a stream, as the Framer sees it: one at the top level, or the root."""

    tag: str = ""  # its name, as lxml writes it
    attributes: dict[str, str] = {}
    start: int = 0  # where it begins, as expat counts
    data: bytes = b""  # all of it, once it is complete; but not of one over max_stanza

    @property
    def name(self) -> str:
        """Its name without namespace."""
        return self.tag.rpartition("}")[2]


class Framer:
    """Finds the root and the top-level elements in bytes of a stream, with expat.

    It is slow (a Python call for each tag) and is used only for the header and in trouble. In exchange it has no
    limits of depth or length but MAX_DEPTH, and takes all the XML that servers take, since these use expat, too.
    Whether a prefix is declared it sees only in the names of top-level elements. After `failure` is set nothing
    more must be fed.
    """

    def __init__(self, begin: bytes = _BEGIN, max_stanza: int = sys.maxsize) -> None:
        self.root = Frame()  # its tag is '' until it has begun
        self.frames: list[Frame] = []  # the complete elements
        self.open: Optional[Frame] = None  # the one under way
        self.kept = bytearray()  # the element under way; without one, or if it is too large, only a tag under way
        self.closed = False  # the root has ended
        self.failure: Optional[Fault] = None
        self._max_stanza = max_stanza
        self._kept_from = 0  # where `kept` begins, as expat counts
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._depth = 0  # of open elements
        parser = self._parser = expat.ParserCreate("clientproxyletters")
        if hasattr(parser, "SetReparseDeferralEnabled"):
            parser.SetReparseDeferralEnabled(False)  # else expat 2.6 and newer put off what has come

        def restricted(*_: object) -> None:  # RFC 6120 §11.1
            raise Unacceptable("restricted-xml", "a comment, a processing instruction or a document type")

        def declared(version: str, encoding: Optional[str], standalone: int) -> None:
            if encoding is not None and encoding.lower() != "utf-8":
                raise Unacceptable("unsupported-encoding", f"the server declares {encoding[:40]}")

        parser.XmlDeclHandler = declared
        parser.CommentHandler = parser.ProcessingInstructionHandler = parser.StartDoctypeDeclHandler = restricted
        self.feed(begin)

    def feed(self, data: bytes) -> None:
        """Look at more bytes."""
        try:
            self._utf8.decode(data)
        except UnicodeDecodeError as error:
            self.failure = Fault("not-well-formed", "the server does not write UTF-8")
            # What stands before the fault. error.object may begin with bytes of the last call.
            data = data[: max(0, error.start - len(error.object) + len(data))]
        self.kept += data
        parser = self._parser
        parser.StartElementHandler, parser.EndElementHandler = self._started, self._ended
        parser.StartCdataSectionHandler = self._cdata_started
        try:
            parser.Parse(data)
        except Unacceptable as error:
            self.failure = Fault(*error.args)
        except expat.ExpatError as error:
            detail = expat.ErrorString(error.code) or ""
            is_restricted = detail == expat.errors.XML_ERROR_UNDEFINED_ENTITY
            self.failure = Fault("restricted-xml" if is_restricted else "not-well-formed", detail)
        # A handler that stays set is a reference cycle, and keeps this object alive.
        parser.StartElementHandler = parser.EndElementHandler = parser.StartCdataSectionHandler = None
        end = self._kept_from + len(self.kept)
        keep_from = parser.CurrentByteIndex  # so far expat has come; what is behind it belongs to a tag under way
        if self.failure is None and end - keep_from > self._max_stanza:
            self.failure = Fault("policy-violation", f"a tag of more than max_stanza = {self._max_stanza} bytes")
        if self.failure is not None and self.open is not None:
            self.failure = self.failure._replace(sender=self.open.attributes.get("from", ""))
        if self.open is not None and end - self.open.start <= self._max_stanza:
            keep_from = self.open.start
        del self.kept[: keep_from - self._kept_from]
        self._kept_from = keep_from

    def _started(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unacceptable("policy-violation", f"more than {MAX_DEPTH} nested elements")
        if self._depth > 2:
            return
        texts = {key: text_of(value) for key, value in attributes.items()}
        prefix, _, local = text_of(name).rpartition(":")
        namespaces = {**self.root.attributes, **texts}
        namespace = namespaces.get(f"xmlns:{prefix}" if prefix else "xmlns", "")
        frame = Frame(f"{{{namespace}}}{local}", texts, self._parser.CurrentByteIndex)
        if self._depth == 1:
            self.root = frame
        elif frame.tag in TOP_LEVEL:
            self.open = frame
        elif prefix and not namespace:
            raise Unacceptable("not-well-formed", f"an undeclared prefix {prefix[:200]}")
        else:  # RFC 6120 §4.9.3.24
            raise Unacceptable("unsupported-stanza-type", f"an element {frame.tag[:200]} that is no stanza")

    def _cdata_started(self) -> None:
        if self._depth == 1:  # neither `open` nor `kept` shows it: _take() would let the Framer go in the middle of it
            raise Unacceptable("bad-format", "text between stanzas")

    def _ended(self, name: str) -> None:
        self._depth -= 1
        self.closed = not self._depth
        if self._depth != 1 or self.open is None:
            return
        start = self.open.start - self._kept_from
        end = self._parser.CurrentByteIndex - self._kept_from
        # With `<a/>` expat has come to its end; with `<a></a>` only to the beginning of the end tag.
        tag = _START_TAG.fullmatch(self.kept, start, end)
        is_empty_tag = tag is not None and tag[0].endswith(b"/>")
        if not is_empty_tag:
            end = self.kept.index(b">", end) + 1
        if end - start <= self._max_stanza:
            self.open = self.open._replace(data=bytes(self.kept[start:end]))
        self.frames.append(self.open)
        self.open = None


class StreamParser:
    """The server's half of a stream: bytes in, whole stanzas to the reactions, the kept ones as bytes out.

    Theory of operation. Of what is read, all up to the last end tag of a stanza is given to lxml, with the
    start tag of the header before it and its end tag behind it: a document. Each stanza in it is handed to its
    reaction. One that returns True has rewritten the stanza where it stands, and wants it sent on; any other
    stanza is taken out. What is left is serialised by one call for the whole root: the fastest way, and the
    one that keeps namespaces right (lxml changes those of an element that it moves). What has come behind
    the last end tag is put off until more comes, or until feed_deferred(). So nothing of lxml's outlives a
    read but the parser, which release() lets go, and a stanza under way is bytes.

    Trouble is whatever lxml fails at or complains of, and what an old libxml2 is known for. A stanza that is cut
    off is trouble, too: its end has not come, or the end tag that was found stands in its payload. A Framer then
    takes apart what comes, until nothing is under way any more, and lxml gets each stanza by itself. One that is
    over max_stanza, has a flaw in its namespaces, or fails (it is nested too deeply, say) is refused: a
    substitute with the same name and addresses goes to handler.cannot_carry(). Only where expat fails, too, the
    XML is not well-formed. Without trouble nothing is measured: so a stanza may be over max_stanza by one read.
    """

    _END_TAG = re.compile(rb"</(?:iq|message|presence)>|<handshake/>")
    _LAST_END_TAG = re.compile(rb".*(?:%b)" % _END_TAG.pattern, re.DOTALL)

    def __init__(self, max_stanza: int, handler: Any) -> None:
        """max_stanza: of a stanza, in bytes; of the handler, max_send, unsendable() and cannot_carry() are used."""
        self.reactions: dict[str, React] = {}  # for each of TOP_LEVEL; may change at any time
        self.header = Frame()  # the root; its tag is '' until it has come
        self.fault: Optional[Fault] = None  # nothing more is parsed
        self.closed = False  # the server has ended its stream
        self.output: list[bytes] = []  # stanzas that are to be sent on
        self.deferred = b""  # what is put off until feed_deferred()
        self._searched = 0  # bytes of it in which feed_deferred() has found no end
        self._max_stanza = max_stanza
        self._handler = handler
        self._unread = b""  # of the header, as long as it is not whole
        self._begin = self._end = b""  # its start tag, with nothing but the namespaces, and its end tag
        self._parser: Any = None
        self._framer: Optional[Framer] = None  # in trouble

    @property
    def memory(self) -> int:
        """Bytes that are kept of stanzas under way."""
        return len(self.deferred) + (len(self._framer.kept) if self._framer is not None else 0)

    def read_header(self, data: bytes) -> bytes:
        """Take bytes until `header` or `fault` is set; return those behind the header, which feed() takes.

        They are read with expat, as what stands before the root must not reach libxml2.
        """
        data = self._unread = (self._unread + data).lstrip(b"\xef\xbb\xbf")  # a byte order mark
        framer, tag = Framer(data, MAX_HEADER), _START_TAG.search(data)
        if b"\0" in data[:4]:  # UTF-16, UTF-32
            self.fault = Fault("unsupported-encoding", "the server does not write UTF-8 (RFC 6120 §11.6)")
        elif framer.root.tag and tag is not None:
            self.header, self.closed = framer.root, tag[0].endswith(b"/>")
            namespaces = [(key, name) for key, name in sorted(framer.root.attributes.items()) if key[:5] == "xmlns"]
            declared = "".join(f" {key}='{escaped(name)}'" for key, name in namespaces)
            self._begin, self._end = b"<%b%b>" % (tag[1], declared.encode()), b"</%b>" % tag[1]
            if flaw_of(self._begin + self._end) != "":
                self.fault = Fault("not-well-formed", "the stream header: it declares a namespace that it must not")
            return data[tag.end() :]
        elif framer.failure is not None:
            detail = f"the stream header: {framer.failure.detail}; is this its component port?"
            self.fault = framer.failure._replace(detail=detail)
        elif len(data) > MAX_HEADER:
            self.fault = Fault("policy-violation", f"the stream header: more than {MAX_HEADER} bytes before its end")
        return b""

    def feed(self, data: bytes) -> None:
        """Take what was read behind the header."""
        start = max(0, len(self.deferred) - len(b"<handshake/>"))  # an end tag may have come in part before
        self.deferred += data
        first = None if self._framer is None else self._END_TAG.search(self.deferred, start)
        if first is not None:  # the trouble may end here: then lxml gets all the rest at once
            self._take(first.end())
            start = 0
        last = self._LAST_END_TAG.match(self.deferred, start)
        if last is not None:
            self._take(last.end())
        if len(self.deferred) > min(LONG_STANZA, self._max_stanza):
            # A Framer reads an unfinished tag anew each time. So it waits until what is new is over a third of what it
            # keeps: linear time.
            is_worth_it = 4 * len(self.deferred) > self.memory  # without a Framer it always is
            if is_worth_it:
                self._take(len(self.deferred))

    def feed_deferred(self) -> None:
        """Take what feed() has put off, as nothing more is there to be read; if no stanza can end in it, it waits."""
        news = self.deferred[max(0, self._searched - 1) :]  # one byte is searched again: the `<` of `</`, say
        self._searched = len(self.deferred)
        # A `>` at the very end may be that of a comment, say, which is a fault to be told at once.
        may_end = b"/>" in news or b"</" in news or news.endswith(b">")
        if self._framer is not None:  # of an end tag it may have a part already
            may_end = b">" in news
        if may_end:
            self._take(len(self.deferred))

    def release(self) -> None:
        """Let go of everything of lxml's; the next bytes make a new parser, in whichever thread they come."""
        self._parser = None

    def _take(self, size: int) -> None:
        """Parse so many bytes of what was put off, unless the stream has come to an end."""
        data, self.deferred, self._searched = self.deferred[:size], self.deferred[size:], 0
        if self.fault is not None or self.closed:
            return
        if self._framer is None:
            # What an old libxml2 cannot carry, or only slowly, and does not complain of.
            is_raw = _RAW_NAMESPACES and b"&" in data and _ESCAPE_IN_NAMESPACE.search(data)
            is_slow = _SLOW_LOOK_UP and data.count(b"xmlns") > MAX_NAMESPACES
            if not is_raw and not is_slow:
                root, complaints = self._parse(data)
                # Some complaints mean nothing, see _parse(): then flaw_of() decides.
                if root is not None and (not complaints or flaw_of(self._begin + data + self._end) == ""):
                    self._handle(root)
                    return
        framer = self._framer or Framer(self._begin, self._max_stanza)
        framer.feed(data)
        for frame in framer.frames:
            self._carry(frame)
            if self.fault is not None:
                return
        framer.frames.clear()
        self.fault, self.closed = framer.failure, framer.closed
        is_over = framer.open is None and not framer.kept
        self._framer = None if is_over else framer

    def _parse(self, data: bytes) -> tuple[Any, Any]:
        """Let lxml have whole stanzas; return the root, None where it does not take them, and lxml's complaints.

        It complains of a prefix that is not declared, but also of harmless names of namespaces, such as `a b`. As
        close() may fail for these, too, it is a comment of ours, behind the stanzas, that leads to the root.
        """
        if self._parser is None:
            self._parser = etree.XMLPullParser(("comment", "pi"), collect_ids=False, huge_tree=True)
            self._parse(b"")  # a parser keeps its first document with a comment for ever: so a small one
        parser, is_taken = self._parser, False
        with contextlib.suppress(etree.XMLSyntaxError):  # it is among the complaints
            parser.feed(self._begin + data + b"<!---->" + self._end)
            is_taken = True
            parser.close()
        marks = [element for _, element in parser.read_events()]
        root = marks[0].getparent() if is_taken and len(marks) == 1 else None  # of several, one is the server's
        # It is none if the server's own end tag came before our mark, and an inner element if that is not closed. If
        # something unfinished (a CDATA section, say) has swallowed ours, the mark is a comment of the server's.
        if root is None or root.getparent() is not None or root[-1] is not marks[0]:
            return None, parser.feed_error_log
        marks.clear()
        del root[-1]
        return root, parser.feed_error_log

    def _handle(self, root: Element) -> None:
        """Hand over all stanzas of a document, and write those that are kept."""
        root.text = None  # text between stanzas is no part of them
        for element in list(root):
            react = self.reactions.get(element.tag)
            if react is None and self.fault is None:  # RFC 6120 §4.9.3.24
                self.fault = Fault("unsupported-stanza-type", f"an element {element.tag[:200]} that is no stanza")
            if react is not None and self.fault is None and react(element):
                element.tail = None
            else:
                # First cleared: lxml repairs namespaces in what is removed, in cubic time where Python refers into it.
                element.clear()
                root.remove(element)
        # All is written at once, without the root's tags; what these declare is then missing. That does no harm if the
        # root of our own stream declares just the same.
        if len(root) and self._begin == _BEGIN:
            text = etree.tostring(root, encoding="unicode")  # with encode() below, 1 % of all faster than "utf-8" here
            output = text[text.index(">") + 1 : -len(self._end)].encode()
            if len(output) <= self._handler.max_send:
                self.output.append(output)
                return
        for element in root:
            data = bytes_of(element)
            if len(data) > self._handler.max_send:
                self._handler.unsendable(element.attrib, STANZAS[element.tag])
            else:
                self.output.append(data)

    def _carry(self, frame: Frame) -> None:
        """Let lxml have one whole stanza, or hand over a substitute for it, with the same name and addresses."""
        if frame.data:
            why = flaw_of(self._begin + frame.data + self._end)
        else:
            why = f"it has more than max_stanza = {self._max_stanza} bytes"
        if why is None:
            sender = frame.attributes.get("from", "")
            self.fault = Fault("not-well-formed", "an undeclared prefix, or the like", sender)
            return
        if not why:  # lxml may have it
            root, complaints = self._parse(frame.data)
            if root is not None:  # as expat has no complaint, lxml's do not count
                self._handle(root)
                return
            why = f"the parser cannot take it: {complaints.last_error}"[:300]
        element = etree.Element(frame.tag)
        for key in {"type", "from", "to", "id"} & frame.attributes.keys():
            element.set(key, frame.attributes[key])
        etree.SubElement(element, "payload")  # without one a request is a bad-request
        self._handler.cannot_carry(self.reactions[frame.tag], element, why)


# --------------------------------------------------------------------- the component stream (XEP-0114)


class State(Enum):
    """The states of a component's stream."""

    OPENING = "opening"  # nothing but our header is sent, the server's is awaited
    FAULTY = "faulty"  # the server's header is at fault, and a stream error is awaited that says more
    AUTHENTICATING = "authenticating"  # the handshake is sent
    READY = "ready"
    CLOSING = "closing"  # our </stream:stream> is to be sent, or sent; the server's is awaited
    CLOSED = "closed"  # the server's end has come, or the connection's, or neither in time


class ComponentStream:
    """One stream to the server (XEP-0114 §3), without a socket: bytes in, bytes out.

    Theory of operation. open() begins it. Then the owner of the connection calls receive() with what the
    server sent, receive_deferred() when nothing more is there, receive_end() when the connection has ended,
    and tick() when next_deadline() has passed; after each of them it sends data_to_send(). What is done
    with an element follows from the state and the element's name alone, by the table below. close() leads to
    CLOSING, in which nothing more is sent; CLOSED follows when the server has ended its side, or does not do
    so in time: then the connection is of no more use. `failure` tells why the stream ended, unless that was
    our own wish.
    """

    # A name that begins with _ is a method of this class, any other one of the handler. OPENING and CLOSED have
    # no row: no element comes before the server's header, or after its end.
    _ELEMENTS =               ("error",  "features", "handshake", "iq",          "message", "presence")
    _REACTIONS = {
        State.FAULTY:         ("_error", "_ignore",  "_ignore",   "_ignore",     "_ignore", "_ignore"),
        State.AUTHENTICATING: ("_error", "_ignore",  "_accepted", "_stray",      "_stray",  "_stray"),
        State.READY:          ("_error", "_ignore",  "_ignore",   "iq",          "message", "presence"),
        State.CLOSING:        ("_error", "_ignore",  "_ignore",   "after_close", "_ignore", "_ignore"),
    }  # fmt: skip

    def __init__(self, component: "Component", handler: "Proxy", clock: Clock) -> None:
        self.state = State.OPENING
        self.failure = Fault("", "the server ended the stream")  # as long as nothing else is known
        self.ready_at = NEVER  # when the handshake was accepted
        self.parser = StreamParser(component.max_stanza, handler)
        self._component, self._handler, self._clock = component, handler, clock
        self._out: list[bytes] = []
        self._last_seen = self._last_sent = clock.now
        self._deadline = NEVER  # by when a state other than READY must have ended
        self._pinged = NEVER  # when, and nothing has come since

    # -- what the owner of the connection calls

    def open(self) -> None:
        """Begin the stream: XEP-0114 §3, example 1."""
        self._deadline = self._clock.now + HANDSHAKE_WITHIN
        self._out.append(
            f"<?xml version='1.0'?><stream:stream xmlns='{NS_COMPONENT}' xmlns:stream='{NS_STREAM}' "
            f"to='{escaped(self._component.jid)}'>".encode()
        )

    def receive(self, data: bytes) -> None:
        """Handle what the server sent: every complete stanza before a fault, then the fault."""
        parser = self.parser
        self._last_seen, self._pinged = self._clock.now, NEVER
        if not parser.header.tag and parser.fault is None:
            data = parser.read_header(data)
            if parser.header.tag:
                self._opened()
        parser.feed(data)
        self._finish_reading()

    def receive_deferred(self) -> None:
        """Handle what receive() held back, as nothing more is there to be read."""
        self.parser.feed_deferred()
        self._finish_reading()

    def receive_end(self, why: str) -> None:
        """The connection has ended, is given up or did not come about."""
        self.receive_deferred()
        self.close(Fault("", why))
        self.state, self._deadline = State.CLOSED, 0.0  # nothing is waited for any more

    def data_to_send(self) -> bytes:
        """Return what is to be sent since the last call, whole stanzas, and forget it.

        What is sent on comes first: what send() and close() have added may end with </stream:stream>.
        """
        data = b"".join(self.parser.output + self._out)
        if data:
            self.parser.output.clear()
            self._out.clear()
            self._last_sent = self._clock.now
        return data

    def send(self, data: bytes) -> bool:
        """Put a stanza behind what is to be sent; return False where our end of the stream was sent already."""
        if self.is_ending:
            return False
        self._out.append(data)
        return True

    @property
    def is_ending(self) -> bool:
        """Whether nothing can be sent any more, as our end of the stream has been put."""
        return self.state is State.CLOSING or self.state is State.CLOSED

    def close(self, failure: Optional[Fault] = None) -> None:
        """End the stream from our side, for a failure, or because we want to, or the server does (RFC 6120 §4.4)."""
        if self.is_ending:
            return
        if failure is not None and self.state is not State.FAULTY:
            self.failure = failure
        if self.failure.condition and not self.failure.of_server:  # RFC 6120 §4.9
            error = f"<stream:error><{self.failure.condition} xmlns='{NS_STREAM_ERRORS}'/></stream:error>"
            self._out.append(error.encode())
        self._out.append(b"</stream:stream>")
        self._deadline = self._clock.now + LINGER  # a socket closed with input unread loses what is still to be sent
        self._enter(State.CLOSING)

    def next_deadline(self) -> float:
        """Return when tick() has something to do."""
        if self.state is not State.READY:
            return self._deadline
        keepalive = self._handler.settings.keepalive
        theirs = self._last_seen + keepalive if self._pinged == NEVER else self._pinged + PING_WITHIN
        return min(self._last_sent + keepalive, theirs, self._handler.next_deadline())

    def tick(self) -> None:
        """Do what is due: the handler's work, and keeping the connection alive, as servers drop silent components."""
        now, keepalive, jid = self._clock.now, self._handler.settings.keepalive, self._component.jid
        if self.state is not State.READY:
            if now >= self._deadline:  # where it is FAULTY or CLOSING, it keeps the failure that it has
                self.receive_end(f"no handshake within {HANDSHAKE_WITHIN:.0f} s")
            return
        self._handler.tick()
        if now >= self._pinged + PING_WITHIN:
            silent = now - self._last_seen
            self.close(Fault("connection-timeout", f"the server is silent for {silent:.0f} s, also to a ping"))
        elif self._pinged == NEVER and now >= self._last_seen + keepalive:  # XEP-0199
            self._pinged = now
            ping = "<ping xmlns='urn:xmpp:ping'/>"
            self._out.append(build_stanza("iq", {"type": "get", "id": PING_ID, "from": jid, "to": jid}, ping))
        elif now >= self._last_sent + keepalive:
            self._out.append(b" ")

    # -- reactions

    def _finish_reading(self) -> None:
        if self.parser.closed:
            self.close()
            self.state = State.CLOSED
        elif self.parser.fault is not None:
            self.close(self.parser.fault)

    def _opened(self) -> None:
        """The server's header has come: answer it, or wait for a stream error that says more than its fault."""
        if self.is_ending:  # ours could not be sent, but the server may say why
            return
        header = self.parser.header
        namespace, id_ = header.attributes.get("xmlns", ""), header.attributes.get("id", "")
        if header.tag != STREAM or namespace != NS_COMPONENT:
            what = (f"the server opens a {header.name[:40]!r} of {namespace[:80]!r}, not a stream of {NS_COMPONENT}; "
                    "is this its component port?")  # fmt: skip
            self.failure = Fault("invalid-namespace", what)
        elif not id_:
            self.failure = Fault("bad-format", "the server's stream header has no id")
        if self.failure.condition:
            self._deadline = min(self._deadline, self._clock.now + HEADER_ERROR_WITHIN)
            self._enter(State.FAULTY)
        else:
            digest = hashlib.sha1((id_ + self._component.secret).encode()).hexdigest()
            self._out.append(f"<handshake>{digest}</handshake>".encode())
            self._enter(State.AUTHENTICATING)

    def _accepted(self, element: Element) -> None:
        self.ready_at = self._clock.now
        self._enter(State.READY)
        self._handler.stream_opened(self)

    def _error(self, element: Element) -> None:
        """The server's reason says more than a fault of its header, or than that the connection has broken."""
        text = (element.findtext(f"{{{NS_STREAM_ERRORS}}}text") or "")[:200]
        if self.failure.condition == "invalid-namespace":
            text = f"{text} ({self.failure.detail})".lstrip()
        if self.state is State.FAULTY or not self.failure.condition:
            condition = condition_of(element, f"{{{NS_STREAM_ERRORS}}}*") or "undefined-condition"
            self.failure = Fault(condition, text, of_server=True)
        self.close()

    def _stray(self, element: Element) -> None:
        self.close(Fault("not-authorized", f"<{describe(element)}> came before the handshake was accepted"))

    def _ignore(self, element: Element) -> None:
        pass

    def _enter(self, state: State) -> None:
        self.state = state
        methods = [getattr(self if name[0] == "_" else self._handler, name) for name in self._REACTIONS[state]]
        row = dict(zip(self._ELEMENTS, methods))
        self.parser.reactions = {tag: row[tag.rpartition("}")[2]] for tag in TOP_LEVEL}


# ------------------------------------------------------------------------ the target and who serves


class Resource:
    """Who has requests to answer: a resource of the target, a user whom the target asks, or NOBODY, if they wait."""

    def __init__(self, jid: str) -> None:
        self.jid = jid  # full JID
        self.open = 0  # requests that it has not answered; means nothing for NOBODY
        self.timeouts = 0  # in a row
        self.doubted_at = 0.0  # when it answered service-unavailable, if nothing else has come from it since


NOBODY = Resource("\0")  # no stanza can come from this JID
POLICIES = ("random", "round-robin", "least-outstanding", "sticky")


class Target:
    """The implementing client as one stream knows it: its resources, the subscription, the probing.

    Theory of operation. Servers send presence to a component only in answer to a subscribe and a probe, and
    that may be incomplete or in the wrong order. So both are sent when the stream is ready, and again, with
    growing pauses, while no resource is known. A probe follows when a resource has gone, as it may be back
    already; and when one answers service-unavailable, as the server may have lost it (the stale check).

    A resource that left several requests in a row unanswered, or whose last answer was service-unavailable,
    is a candidate only where there is no other, until something else comes from it.
    """

    def __init__(
        self, component: "Component", clock: Clock, rand: Callable[[], float], say: Say, told: list[object],
        send: Callable[[bytes], object], gone: Callable[[str], None],
    ) -> None:  # fmt: skip
        """told: what the log has heard last, on any stream; gone(JID): is called when this resource is no longer
        available, or, if the JID is bare, none is."""
        self.resources: dict[str, Resource] = {}  # those that serve, by full JID
        self.grace_ends_at = clock.now + GRACE  # until when presence may be under way, if no resource has been known
        self._component, self._jid = component, component.target_address
        self._clock, self._random, self._say, self._told = clock, rand, say, told
        self._send, self._gone = send, gone
        self._candidates: list[Resource] = []  # that choose() chooses from; empty: to be found out again
        self._turns = itertools.count()  # for round-robin
        # For sticky: hash of a requester, as their JIDs may be long -> JID of the resource that they had.
        self._served: collections.OrderedDict[int, str] = collections.OrderedDict()
        self._news = "the stream is ready"  # the last that has happened
        self._none_since = clock.now  # since when no resource is known, while that is so
        self._due: dict[Callable[[], None], float] = {}  # what tick() is to do, and when
        self._done: dict[Callable[[], None], float] = {}  # when it did that last
        # They do the same, but are two entries of _due and _done, each with its own times.
        self._probe = functools.partial(self._send_presence, "probe")  # with a subscribe, or after a loss
        self._check = functools.partial(self._send_presence, "probe")  # the stale check
        self._is_accepted = False  # our subscription
        self._do(self._report, GRACE)
        self._ask()

    # -- what the Proxy calls

    def reconfigure(self, component: "Component") -> None:
        """Choose by another policy, or from other resources. Open requests of those that no longer serve stay open."""
        old, self._component = self._component, component
        if component.policy != old.policy:
            self._served.clear()
        if component.resources != old.resources:
            for jid in list(self.resources):
                if not fnmatch.fnmatchcase(split_jid(jid)[2], component.resources):
                    del self.resources[jid]
                    self._changed(f"{jid} no longer matches the glob of resources")
            self._probe()  # others may match now

    def choose(self, requester: str) -> Resource:
        """Return the resource that gets what a full JID sends, by the policy. Only while there are resources."""
        if not self._candidates:
            every = list(self.resources.values())
            good = [each for each in every if each.timeouts < TIMEOUTS_SUSPECT and not each.doubted_at]
            self._candidates = good or every
        policy, candidates = self._component.policy, self._candidates
        at_random = candidates[int(self._random() * len(candidates))]
        if policy == "random":
            return at_random
        if policy == "round-robin":
            return candidates[next(self._turns) % len(candidates)]
        if policy == "least-outstanding":
            return min(candidates, key=lambda each: (each.open, self._random()))
        # Sticky: the one that the requester had before, while it serves. It is kept also when it is in doubt, as any
        # user can cause doubt; but not when it leaves requests unanswered, unless there is no better one.
        had = self.resources.get(self._served.pop(hash(requester), ""), at_random)
        is_kept = had.timeouts < TIMEOUTS_SUSPECT or had in candidates
        resource = had if is_kept else at_random
        self._served[hash(requester)] = resource.jid
        if len(self._served) > MAX_STICKY:
            self._served.popitem(last=False)
        return resource

    def seen(self, jid: str, element: Element) -> None:
        """Something has come from a full JID: a resource is trusted again. But an error may be the server's own."""
        resource = self.resources.get(jid)
        if resource is not None and condition_of(element) != "service-unavailable":
            resource.timeouts, resource.doubted_at = 0, 0.0
            self._candidates = []

    def timed_out(self, resource: Resource) -> None:
        """A request was not answered by who had it; that matters for a resource, not for a user, or NOBODY."""
        resource.timeouts += 1
        self._candidates = []
        if resource.timeouts == TIMEOUTS_SUSPECT and resource.jid in self.resources:
            hint = "; if its library cannot take such addresses apart (gloox), set encoding = opaque"
            self._say(logging.WARNING, "%s has left %d requests in a row unanswered: it is now the last choice%s",
                      resource.jid, TIMEOUTS_SUSPECT, hint if self._component.encoding == "jid" else "")  # fmt: skip

    def doubt(self, resource: Resource) -> None:
        """A resource has answered service-unavailable: so may the server, for a client that it has lost."""
        resource.timeouts, resource.doubted_at = 0, resource.doubted_at or self._clock.now
        self._candidates = []
        self._do(self._check, every=STALE_CHECK_EVERY)  # at once, unless there was one within the last minute

    # -- presence of the target

    def presence(self, kind: str, sender: str, element: Element) -> None:
        """Handle the target's own presence, of a type, or 'available' for none; seen() has been called for it."""
        if kind == "available":
            last_check = self._done.get(self._check, -NEVER)
            if self._clock.now <= last_check + STALE_CHECK_FOR:  # it is being answered: those it does not name go
                self._do(self._end_check, STALE_CHECK_FOR)
            may_serve = "/" in sender and fnmatch.fnmatchcase(split_jid(sender)[2], self._component.resources)
            if may_serve and sender not in self.resources and len(self.resources) < MAX_RESOURCES:
                self.resources[sender] = Resource(sender)
                self._changed(f"{sender} has come")
        elif kind == "unavailable":
            self._lose(sender, "has gone")
        elif kind == "unsubscribed":
            self._lose(self._jid, "has gone")
            self._is_accepted = False
            self._note(f"{self._jid} has not accepted our subscription")
        elif kind == "error":
            condition = (condition_of(element) or "an error without condition")[:100]
            if "/" in sender:
                self._lose(sender, "has gone")
            self._note(f"presence to {sender} came back: {condition}; is target_address right, its server reachable?")
        elif kind == "subscribed":
            self._note(f"{self._jid} has accepted our subscription")
            if not self._is_accepted:
                self._probe()  # as jabberd2 now names one resource only
            self._is_accepted = True
        elif kind == "subscribe":
            self._send_presence("subscribed")
            self._send_presence(None)
        elif kind == "unsubscribe":
            self._note(f"{self._jid} no longer wants our presence; its own still reaches us")
        elif kind == "probe":
            self._send_presence(None, sender)

    def _lose(self, jid: str, why: str) -> None:
        """A resource has gone, or, if the JID is bare, each. It may have come back before, so the server is asked."""
        gone = list(self.resources if jid == self._jid else self.resources.keys() & {jid})
        for each in gone:
            del self.resources[each]
            self._changed(f"{each} {why}")
        if gone and self.resources:
            self._do(self._probe, LOSS_PROBE_AFTER, LOSS_PROBE_EVERY)
        self._gone(jid)  # also one that serves no longer, by `resources`, may have requests open

    def _changed(self, event: str) -> None:
        """Resources have come or gone; while there is none, the rounds of probe and subscribe go on."""
        self._candidates, self.grace_ends_at = [], 0.0
        self._note(event)
        if self.resources:
            self._due.pop(self._ask, None)
        else:
            self._due.pop(self._probe, None)
            self._none_since = self._clock.now
            self._do(self._ask, 1.0)

    def _note(self, news: str) -> None:
        """Let the log hear of something, unless more happens within a second."""
        self._news = news
        self._do(self._report, REPORT_AFTER)

    def _report(self) -> None:
        """Log the last news and who serves; but a reconnect that brings no news is no line: `told` outlives streams."""
        news = [self._news, len(self.resources)]
        if news == self._told:
            return
        self._told[:] = news
        if self.resources:
            self._say(logging.INFO, "%s: resources of %s that serve: %d", self._news, self._jid, len(self.resources))
        else:
            self._say(logging.WARNING, "%s: no resource of %s serves: log it in, and let it accept the subscription "
                      "request of %s", self._news, self._jid, self._component.jid)  # fmt: skip

    # -- time

    def _do(self, work: Callable[[], None], after: float = 0.0, every: float = 0.0) -> None:
        """Let tick() do something in `after` s, but not within `every` s of the last time; an earlier date stays."""
        when = max(self._clock.now + after, self._done.get(work, -NEVER) + every)
        self._due[work] = min(when, self._due.get(work, NEVER))

    def next_deadline(self) -> float:
        """Return when tick() has something to do."""
        return min(self._due.values(), default=NEVER)

    def tick(self) -> None:
        """Do what is due."""
        for work in list(self._due):
            if self._clock.now >= self._due.get(work, NEVER):  # what was done before may have made it needless
                del self._due[work]
                self._done[work] = self._clock.now
                work()

    def _ask(self) -> None:
        """Send probe and subscribe; neither alone makes every server send the target's presence.

        In this order, as Prosody answers the probe of a stranger by forgetting what they asked before.
        """
        self._probe()
        self._send_presence("subscribe")
        passed = self._clock.now - self._none_since
        self._do(self._ask, min(passed + 1.0, ASK_AGAIN_MAX))  # after 1, 2, 4 ... s, as passed is 0, 1, 3 ... s

    def _end_check(self) -> None:
        """Forget those in doubt since before the check: had the server named them, seen() would have trusted them."""
        for resource in list(self.resources.values()):
            if 0 < resource.doubted_at <= self._done[self._check]:
                self._lose(resource.jid, "answers service-unavailable and is not among what the server knows")

    def _send_presence(self, kind: Optional[str], to: str = "") -> None:
        self._send(build_stanza("presence", {"type": kind, "from": self._component.jid, "to": to or self._jid}))


# ---------------------------------------------------------------------------------- the JAT tables


class Codec:
    """Requesters' JIDs to addresses of the component and back: component/encoded-from.

    With `jid` the resource is the requester's JID itself. With `opaque`, and for a JID that servers refuse as a
    resource (it is too long, or holds right-to-left letters, which stringprep forbids there), it is a token: a
    keyed hash, stable and not to be guessed. Only relayed stanzas need decoding, and so a table of tokens: the
    least recently used go first, at most BUDGET bytes; a user whose share is full loses all of their own.
    """

    def __init__(self, component: str, secret: str, opaque: bool) -> None:
        self._prefix = component + "/"
        self._opaque = opaque
        self._key = hashlib.blake2b(f"clientproxy\0{component}\0{secret}".encode()).digest()
        # Address -> who it stands for, their bare JID, bytes that are counted.
        self._tokens: collections.OrderedDict[str, tuple[str, str, int]] = collections.OrderedDict()
        self._budget = Budget()

    def encode(self, jid: str) -> str:
        """Return the address that stands for a requester towards the implementing client."""
        is_plain = jid.isascii() or not any(unicodedata.bidirectional(char) in ("R", "AL") for char in jid)
        if is_plain and not self._opaque and len(jid.encode()) <= MAX_PART:
            return self._prefix + jid
        digest = hashlib.blake2b(jid.encode(), key=self._key, digest_size=20).hexdigest()
        return f"{self._prefix}.{digest}"

    def decode(self, address: str) -> Optional[str]:
        """Return the requester's JID, or None where the address stands for nobody that is known."""
        if address in self._tokens:
            self._tokens.move_to_end(address)
            return self._tokens[address][0]
        encoded = address[len(self._prefix) :] if address.startswith(self._prefix) else ""
        return encoded if is_jid(encoded) and not self._opaque else None

    def remember(self, address: str, jid: str) -> None:
        """Make it possible to decode an address, if that needs the table; others may have to go for it."""
        user = jid.partition("/")[0]
        size = sys.getsizeof(address) + sys.getsizeof(jid) + 200  # so much for their places in tables
        if address == self._prefix + jid or self.decode(address) is not None or size > BUDGET // 16:
            return
        while not self._budget.add(user, size):
            gone = [next(iter(self._tokens))]
            if self._budget.used + size <= BUDGET:  # then it is the user's share that is full
                gone = [each for each, (_, whose, _) in self._tokens.items() if whose == user]
            for each in gone:
                _, whose, freed = self._tokens.pop(each)
                self._budget.add(whose, -freed)
        self._tokens[address] = (jid, user, size)


class Request:
    """An open request, of a user to the target or of the target to a user."""

    def __init__(self, key: RequestKey, requester: str, asked: str, id_: str, user: str, started: float) -> None:
        self.key = key
        self.requester = requester  # JID that asked and is answered
        self.asked = asked  # address that was asked and answers
        self.id = id_  # the requester's
        self.user = user  # bare JID that it counts for
        self.started = started
        self.answerer = NOBODY  # whose answer is accepted
        self.texts = 0  # bytes that are counted for its texts
        self.stanza = b""  # kept while it waits, and while it may be given to another resource
        self.may_move = False  # to another resource, if that which has it leaves


class OpenRequests:
    """The open requests, oldest first, with the bounds on them; and, among them, the line of those that wait."""

    def __init__(self) -> None:
        self.table: dict[RequestKey, Request] = {}
        self.waiting: dict[Request, float] = {}  # since when; in the order in which they are served
        self._users: dict[str, int] = {}  # bare JID -> how many
        # Those whose key's address is not ASCII, by its NFKC form and the id.
        self._forms: dict[RequestKey, list[Request]] = {}
        self._texts = Budget()  # of requests with over 300 characters in them; for shorter ones the caps are enough
        self.stanzas = Budget()  # that are kept

    def add(self, request: Request, caps: "Component") -> str:
        """Enter a request; return the condition with which it must be refused, or ''."""
        key, user = request.key, request.user
        if key in self.table:
            return "conflict"
        count = self._users.get(user, 0)
        if len(self.table) >= caps.max_pending or count >= caps.max_pending_per_user:
            return "resource-constraint"
        if len(key[0]) + len(request.requester) + len(request.id) + len(request.asked) > 300:
            request.texts = sum(map(sys.getsizeof, (*key, request.requester, request.id, request.asked)))
            if not self._texts.add(user, request.texts):
                return "resource-constraint"
        self.table[key] = request
        self._users[user] = count + 1
        if not key[0].isascii():
            self._forms.setdefault((form_of(key[0]), key[1]), []).append(request)
        return ""

    def assign(self, request: Request, answerer: Resource) -> None:
        """Let a resource, or a user, answer a request; or NOBODY, while it waits."""
        request.answerer = answerer
        answerer.open += 1

    def find(self, key: RequestKey, sender: str) -> Optional[Request]:
        """Return the request that `sender` answers, or None. Some libraries bring the address into NFKC before."""
        request = self.table.get(key)
        if request is not None and request.answerer.jid == sender:
            return request
        similar = self._forms.get((form_of(key[0]), key[1]), [])
        fitting = [each for each in similar if each.answerer.jid == sender]
        return fitting[0] if len(fitting) == 1 else None

    def close(self, request: Request) -> None:
        """Take out a request."""
        key, user = request.key, request.user
        del self.table[key]
        others = self._users.pop(user) - 1
        if others:
            self._users[user] = others
        request.answerer.open -= 1
        if request.texts:
            self._texts.add(user, -request.texts)
        if request.stanza:  # as each that waits has one
            self.waiting.pop(request, None)
            self.keep(request, b"")
        if not key[0].isascii():
            form = (form_of(key[0]), key[1])
            self._forms[form].remove(request)
            if not self._forms[form]:
                del self._forms[form]

    def keep(self, request: Request, stanza: bytes) -> None:
        """Keep the bytes of a request, if they fit in; with b'' no longer."""
        if self.stanzas.add(request.user, len(stanza) - len(request.stanza)):
            request.stanza = stanza


# -------------------------------------------------------------------------------- the proxy's rules


def allow_function(globs: tuple[str, ...]) -> Optional[Callable[[str], bool]]:
    """Return a function that says whether a full JID may ask, None for everyone.

    A glob with `/` is matched against the full JID, one with `@` against the bare JID, any other against the domain;
    `*` and `?` match neither `@` nor `/`: else a resource, which its user chooses, could look like a domain. There is
    no [...] as fnmatch has it.
    """
    if "*" in globs:
        return None
    matches = {glob: re.compile(fnmatch.translate(glob.replace("[", "[[]"))).match for glob in globs}

    def allowed(jid: str) -> bool:
        subjects = (jid, jid.partition("/")[0], split_jid(jid)[1])
        # With as many `@` and `/` in both, no `*` or `?` stands for one: so a glob fits only the subject meant for it.
        return any(
            match(subject) and all(subject.count(mark) == glob.count(mark) for mark in "@/")
            for glob, match in matches.items() for subject in subjects
        )  # fmt: skip

    return allowed


class Histogram:
    """How often something took how long."""

    def __init__(self) -> None:
        self.counts = [0] * (len(SECOND_BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.sum += max(0.0, seconds)  # where the loop has set its clock back a little
        self.counts[bisect_left(SECOND_BUCKETS, seconds)] += 1


class Figures:
    """What is counted for a component; every series is there from the start."""

    DROPS = ("answer to nothing", "answer from another resource", "without from", "not addressed to the component",
             "own stanza bounced", "cannot be carried", "error over max_send", "no connection")  # fmt: skip

    def __init__(self) -> None:
        refused = dict.fromkeys(CONDITIONS, 0)
        relayed = {"relayed": 0, **refused}
        self.outcomes = {"iq": refused, "message": relayed, "presence": dict(relayed)}
        self.dropped = dict.fromkeys(self.DROPS, 0)
        self.answer_seconds = Histogram()
        self.waiting_seconds = Histogram()
        self.unserved = 0  # requests that waited for a resource in vain
        self.connects = self.received = self.sent = 0  # streams that became ready; bytes


def addresses_of(attributes: Any) -> tuple[str, str, str, str]:
    """Return type, to, from and id of a stanza, each '' where absent."""
    return attributes.get("type", ""), attributes.get("to", ""), attributes.get("from", ""), attributes.get("id", "")


class Proxy:
    """One component's rules: what is done with each stanza that comes in.

    It outlives its streams: stream_opened() hands it a new one, stream_lost() takes it away, reconfigure()
    changes what does not concern the stream. The handlers iq(), message() and presence() return True for a
    stanza that they have rewritten and that is to be sent on, False for one that ends here.
    """

    def __init__(
        self, component: "Component", domains: frozenset[str], clock: Clock, rand: Callable[[], float], say: Say
    ) -> None:
        self.jid = component.jid
        self.requests = OpenRequests()
        self.figures = Figures()
        self.backlog: list[tuple[float, bytes]] = []  # what waits for the next stream, and since when
        self.backlog_bytes = Budget()
        self._clock, self._say = clock, say
        self.draining = False
        self._stream: Optional[ComponentStream] = None
        self._lang: Optional[str] = None  # of stanzas without one, RFC 6120 §4.7.4
        self._target_jid = component.target_address
        self._codec = Codec(component.jid, component.secret, component.encoding == "opaque")
        self._cannot_carry = False  # the stanza at hand is a substitute for one that cannot be carried
        self._put_off: collections.deque[tuple[float, Request, bytes]] = collections.deque()  # answers, until when
        self._silent_until: dict[str, float] = {}  # until when the log hears nothing of something
        # Makes the Target of each stream; all have the same list `told`, as what the log has heard outlives them.
        self._new_target = functools.partial(
            Target, clock=clock, rand=rand, say=say, told=[], send=self._send, gone=self._resource_gone)  # fmt: skip
        self.target = self._new_target(component)
        self.reconfigure(component, domains)

    def succeed(self, before: "Proxy") -> None:
        """Take over from the Proxy of an earlier configuration: figures, backlog, and whether it is draining."""
        self.figures, self.backlog, self.backlog_bytes = before.figures, before.backlog, before.backlog_bytes
        self.draining = before.draining

    def reconfigure(self, component: "Component", domains: frozenset[str]) -> None:
        """Go on with other settings; domains: those of all components of this daemon, which must not ask each other."""
        self.settings, self._domains = component, domains
        self._hold, self._relay_kinds = component.hold, component.relay
        self.max_send = component.max_send  # lower than configured, once the server has refused that
        self._allowed = allow_function(component.allow)
        self.target.reconfigure(component)

    # -- the stream comes and goes

    @property
    def owed(self) -> int:
        """How many answers are still to be given."""
        return len(self.requests.table) + len(self.backlog)

    def stream_opened(self, stream: ComponentStream) -> None:
        """The handshake was accepted: send what was owed, ask for presence."""
        self._stream = stream
        self._lang = stream.parser.header.attributes.get("xml:lang")
        self._say(logging.INFO, "connected to %s, the stream is ready", self.settings.server)
        self.figures.connects += 1
        framer = Framer()  # of what is too large now: a reload may have lowered max_send
        for since, data in self.backlog:
            if self._clock.now < since + BACKLOG_KEPT and len(data) <= self.max_send:
                self._send(data)
            elif self._clock.now < since + BACKLOG_KEPT:
                framer.feed(data)
            else:
                self._drop("no connection", "an answer that has waited for too long: the requester has given up")
        self.backlog.clear()
        self.backlog_bytes = Budget()
        for frame in framer.frames:
            self.unsendable(frame.attributes, frame.name)
        self.target = self._new_target(self.settings)

    def stream_lost(self, failure: Fault, data: bytes, gone: int) -> None:
        """The stream has ended: what is open is answered on the next one, and so is what could not be sent.

        data: all that was to be sent in the last moments; gone: how many bytes of it the system has taken.
        """
        self._stream = None
        self.target = self._new_target(self.settings)  # an empty one: what it asks goes nowhere
        framer, culprit = Framer(), None
        framer.feed(data[:gone])
        whole = len(framer.frames)  # how many are sent as a whole
        begun = whole + bool(framer.kept)  # and at least in part
        framer.feed(data[gone:])
        # With these errors ejabberd and Prosody answer a stanza over their limit; the largest one sent is taken for it.
        if failure.of_server and failure.condition in ("policy-violation", "not-well-formed"):
            large = [each for each in framer.frames[:begun] if len(each.data) > LEAST_LIMIT]
            culprit = max(large, key=lambda frame: len(frame.data), default=None)
        if culprit is not None:
            self._lower_limit(culprit)
        for number, frame in enumerate(framer.frames):
            kind, to, _, _ = addresses_of(frame.attributes)
            is_owed = number >= whole and (frame.name == "message" or kind in ("result", "error"))
            if frame is culprit or (is_owed and len(frame.data) > self.max_send):
                self.unsendable(frame.attributes, frame.name)
            elif is_owed:
                self._owe(to, frame.data)
        self.answer_all()  # also where the request itself was lost

    def _lower_limit(self, culprit: Frame) -> None:
        """The server has refused a stanza: from now on its size is too large."""
        size, is_first = len(culprit.data), self.max_send == self.settings.max_send
        limit = size - 1 if is_first else size // 2  # a small cut, as one may be chance; then go down fast
        self.max_send = min(self.max_send, max(limit, LEAST_LIMIT))
        self._say(logging.WARNING, "the server ended the stream over a stanza of %d bytes from %s to %s: from now "
                  "on at most %d are sent; set max_send to the server's limit", size,
                  culprit.attributes.get("from"), culprit.attributes.get("to"), self.max_send)  # fmt: skip

    def answer_all(self) -> None:
        """Answer every open request with an error."""
        self._end(self.requests.table.values(), "recipient-unavailable")

    def drain(self) -> None:
        """From now on refuse new requests; those that wait have nothing to wait for."""
        self.draining, self._hold = True, 0.0
        self._end(self.requests.waiting, "recipient-unavailable")

    # -- stanzas; the first ones are the hot path

    def iq(self, iq: Element) -> bool:
        attributes: Attributes = iq.attrib  # faster than get() and set(): 4 % of all
        try:
            kind, sender, to, id_ = attributes[b"type"], attributes[b"from"], attributes[b"to"], attributes[b"id"]
        except KeyError:
            kind, to, sender, id_ = addresses_of(attributes)
        if kind == "get" or kind == "set":
            return self._request(iq, attributes, sender, to, id_)
        if kind == "result" or kind == "error":
            return self._answer(iq, attributes, kind, sender, (to, id_))
        return self._request(iq, attributes, sender, to, "")  # it is refused like a request without id

    def _request(self, iq: Element, attributes: Attributes, sender: str, to: str, id_: str) -> bool:
        user = sender.partition("/")[0]
        if not self._may_pass(iq, user, to):
            return False
        if self.draining:
            return self._refuse(iq, "recipient-unavailable")
        if not id_ or len(iq) != 1:  # RFC 6120 §8.2.3
            return self._refuse(iq, "bad-request")
        if user == self._target_jid:
            return self._request_of_target(iq, sender, to, id_)
        encoded = self._codec.encode(sender)
        request = Request((encoded, id_), sender, to, id_, user, self._clock.now)
        refusal = self.requests.add(request, self.settings)
        if refusal:
            return self._refuse(iq, refusal)
        if self._cannot_carry:
            return self._end([request], "policy-violation")
        if self._hold:
            is_held_back = self._hold_back(iq, request)
            if is_held_back:
                return False
        elif not self.target.resources:
            is_early = self._clock.now < self.target.grace_ends_at
            return self._end([request], "recipient-unavailable" if is_early else "service-unavailable")
        resource = self.target.choose(sender)
        self.requests.assign(request, resource)
        if self._relay_kinds:
            self._codec.remember(encoded, sender)
        return self._forward(attributes, resource.jid, encoded)

    def _answer(self, iq: Element, attributes: Attributes, kind: str, sender: str, key: RequestKey) -> bool:
        request = self.requests.find(key, sender)
        if request is None:
            # One without `from` is counted as an answer to nothing, whatever else _may_pass() would say of it.
            if not sender or self._may_pass(iq, sender.partition("/")[0], key[0]):
                is_asked = key in self.requests.table
                self._drop("answer from another resource" if is_asked else "answer to nothing", describe(iq))
            return False
        self._forward(attributes, request.requester, request.asked)
        if request.user == self._target_jid:  # it has asked, and a fresh id was sent
            attributes[b"id"] = request.id
        elif kind == "error" and condition_of(iq) == "service-unavailable":
            self.target.doubt(request.answerer)
            # Servers say so for a resource that is leaving, before they say that it has left. So a get, which can
            # then move to another one, waits for that. Only such a get has kept its stanza.
            data = bytes_of(iq) if request.stanza and self._hold else b""
            if 0 < len(data) <= self.max_send:  # a larger one goes on to unsendable()
                self._put_off.append((self._clock.now + LEAVING_WITHIN, request, data))
                return False
        elif request.answerer.timeouts or request.answerer.doubted_at:
            self.target.seen(sender, iq)
        self.requests.close(request)
        self.figures.answer_seconds.observe(self._clock.now - request.started)
        return True

    def _forward(self, attributes: Attributes, to: str, from_: str) -> bool:
        """Rewrite a stanza where it stands, to be sent on."""
        attributes[b"from"] = from_
        attributes[b"to"] = to
        if self._lang is not None and XML_LANG not in attributes:
            attributes[XML_LANG] = self._lang
        return True

    def after_close(self, iq: Element) -> bool:
        """A request that comes when our end of the stream is sent already is answered on the next one."""
        kind, to, sender, id_ = addresses_of(iq.attrib)
        if kind not in ("get", "set") or not id_ or self._cannot_carry:
            return False
        if self._may_pass(iq, sender.partition("/")[0], to):
            self._refuse(iq, "recipient-unavailable")
        return False

    def _request_of_target(self, iq: Element, sender: str, to: str, id_: str) -> bool:
        """With relay = iq a serving resource may ask the user that component/encoded-from stands for."""
        if "iq" not in self._relay_kinds or sender not in self.target.resources or to == self.jid:
            return self._refuse(iq, "not-allowed")
        user = self._decode(to)
        if user is None:
            return self._refuse(iq, "item-not-found")
        fresh = f"{hash((sender, to, id_)) % 2**64:x}"  # the same for the same request: then it is a conflict
        request = Request((self.jid, fresh), sender, to, id_, self._target_jid, self._clock.now)
        refusal = self.requests.add(request, self.settings)
        if refusal:
            return self._refuse(iq, refusal)
        self.requests.assign(request, Resource(user))
        iq.set("id", fresh)
        return self._forward(iq.attrib, user, self.jid)

    def _decode(self, address: str) -> Optional[str]:
        """Return whom an address of the component stands for, None: for nobody, or for a component of this daemon."""
        requesters = (request.requester for key, request in self.requests.table.items() if key[0] == address)
        user = self._codec.decode(address) or next(requesters, None)  # its token may be forgotten
        return None if user is None or split_jid(user)[1].lower() in self._domains else user

    def message(self, element: Element) -> bool:
        """Send on a message, or presence other than the target's own, or refuse it."""
        name, (kind, to, sender, _) = STANZAS[element.tag], addresses_of(element.attrib)
        user = sender.partition("/")[0]
        if not self._may_pass(element, user, to):
            return False
        is_of_target = user == self._target_jid
        is_subscription = name == "presence" and kind not in ("", "unavailable")  # belongs to bare JIDs, RFC 6121 §3
        if name not in self._relay_kinds or is_subscription or (is_of_target and to == self.jid):
            return self._refuse(element, "feature-not-implemented")
        requester = self._decode(to) if is_of_target else sender
        if requester is None:
            return self._refuse(element, "item-not-found")
        if not is_of_target and not self.target.resources:
            return self._refuse(element, "service-unavailable")
        if is_of_target:
            receiver, from_ = requester, self.jid
        else:
            receiver, from_ = self.target.choose(requester).jid, self._codec.encode(requester)
            self._codec.remember(from_, requester)
        self._forward(element.attrib, receiver, from_)
        # Its size is known only now, when it is rewritten. To be refused, it gets its addresses back.
        if self._cannot_carry or len(bytes_of(element)) > self.max_send:
            self._forward(element.attrib, to, sender)
            return self._refuse(element, "policy-violation")
        self.figures.outcomes[name]["relayed"] += 1
        return True

    def presence(self, presence: Element) -> bool:
        kind, to, sender, _ = addresses_of(presence.attrib)
        user = sender.partition("/")[0]
        if user != self._target_jid and form_of(user).casefold() == form_of(self._target_jid).casefold():
            self._say_once_in(NEVER, "look-alike", logging.WARNING, "presence comes from %s (%a), which looks like %s "
                              "(%a): if that is how the server spells the account, write it so in target_address",
                              user, user, self._target_jid, self._target_jid)  # fmt: skip
        # Sent to component/encoded-from, these concern a user: they tell nothing of the target's resources.
        if user != self._target_jid or (kind in ("", "unavailable", "error") and split_jid(to)[2]):
            return self.message(presence)
        if self._may_pass(presence, user, to):
            self.target.presence(kind or "available", sender, presence)
        return False

    def unsendable(self, attributes: Any, name: str) -> None:
        """A rewritten stanza is too large to be sent: tell the requester of an IQ; of any other only the log hears."""
        kind, to, from_, id_ = addresses_of(attributes)
        if name != "iq":
            self._drop("cannot be carried", f"a {name} to {to[:200]!r}: it is too large")
        elif kind in ("result", "error"):
            self._error("iq", "policy-violation", to, from_, id_)
        else:
            request = self.requests.find((from_, id_), to)  # its answer would have come so
            if request is not None:
                self._end([request], "policy-violation")

    def cannot_carry(self, react: React, element: Element, why: str) -> None:
        """A stanza cannot be carried: all rules for what its attributes say hold, but it is not sent on."""
        self._drop("cannot be carried", f"{describe(element)}: {why}")
        self._cannot_carry = True
        kept = react(element)
        self._cannot_carry = False
        if kept:  # it answers a request, which is closed now: the requester must still hear something
            self.unsendable(element.attrib, "iq")

    # -- requests that wait, and time

    def _hold_back(self, iq: Element, request: Request) -> bool:
        """Keep a get, which may move, and let a request wait where it must; return False where it goes on."""
        must_wait = not self.target.resources or bool(self.requests.waiting)
        request.may_move = iq.get("type") == "get"
        if must_wait or request.may_move:
            self._forward(iq.attrib, "", request.key[0])
            del iq.attrib["to"]  # _serve_waiting() puts in another one
            self.requests.keep(request, bytes_of(iq))
        if must_wait and not request.stanza:
            self._end([request], "resource-constraint")
        elif must_wait:
            self.requests.waiting[request] = self._clock.now
            waiting = count_of(len(self.requests.waiting), "request waits", "requests wait")
            self._say_once_in(LOG_RARELY, "waiting", logging.INFO, "%s for a resource of %s", waiting, self._target_jid)
        return must_wait

    def _serve_waiting(self) -> None:
        """Send the first of those that wait; the rest in later turns of the loop, which does other work between."""
        for request in list(itertools.islice(self.requests.waiting, BURST)):
            since = self.requests.waiting.pop(request)
            self.figures.waiting_seconds.observe(self._clock.now - since)
            resource = self.target.choose(request.requester)
            self.requests.assign(request, resource)
            data = request.stanza.replace(b" ", f" to='{escaped(resource.jid)}' ".encode(), 1)  # behind its name
            if not request.may_move:
                self.requests.keep(request, b"")
            if self._relay_kinds:
                self._codec.remember(request.key[0], request.requester)
            if len(data) <= self.max_send:
                self._send(data)
            else:
                self._end([request], "policy-violation")

    def _resource_gone(self, jid: str) -> None:
        """Answer its open requests, or all resources' if the JID is bare; but a get that may move lines up again."""
        requests = self.requests.table.values()
        for request in [each for each in requests if jid in (each.answerer.jid, each.answerer.jid.partition("/")[0])]:
            if request.stanza and self._hold:  # it is a get that may move, as only these keep their stanza
                request.may_move = False  # once only: served again, it keeps no stanza, and so cannot come here
                self.requests.assign(request, NOBODY)
                self.requests.waiting[request] = self._clock.now
            else:
                self._end([request], "recipient-unavailable")

    def next_deadline(self) -> float:
        """Return when tick() has something to do; only while there is a stream."""
        hold = 0.0 if self.target.resources else self._hold
        hold_ends_at = next(iter(self.requests.waiting.values()), NEVER) + hold
        put_off_until = self._put_off[0][0] if self._put_off else NEVER
        timeout_at = next((each.started for each in self.requests.table.values()), NEVER) + self.settings.timeout
        return min(self.target.next_deadline(), timeout_at, put_off_until, hold_ends_at)

    def tick(self) -> None:
        """Do what is due, while the stream is ready; everything that has arrived has been handled before."""
        now, requests, timeout = self._clock.now, self.requests, self.settings.timeout
        self.target.tick()
        while self._put_off and now >= self._put_off[0][0]:
            _, request, data = self._put_off.popleft()
            # Is it still owed? Once closed or moved, a request keeps no stanza; if it waits again, NOBODY has it.
            if request.stanza and request.answerer is not NOBODY:
                requests.close(request)
                self.figures.answer_seconds.observe(now - request.started)
                self._send(data)
        if not self.target.resources:
            first = itertools.islice(requests.waiting.items(), BURST)
            self._end([each for each, since in first if now >= since + self._hold], "service-unavailable")
        oldest = itertools.islice(requests.table.values(), BURST)
        for request in [each for each in oldest if now >= each.started + timeout]:
            self._end([request], "remote-server-timeout")
            self.target.timed_out(request.answerer)
        if self.target.resources:
            self._serve_waiting()

    # -- helpers

    def _may_pass(self, element: Element, user: str, to: str) -> bool:
        """Whether a stanza from that bare JID may go on; else it ends here, and is refused where that is due."""
        if user == self.jid:  # our own has come back: some servers bounce a stanza with its `from` as it was
            if element.get("type") == "error" and element.get("id") != PING_ID:  # an error, too, is a sign of life
                self.figures.dropped["own stanza bounced"] += 1
        elif not user or (to != self.jid and split_jid(to)[1].lower() != self.jid):
            self._drop("not addressed to the component" if user else "without from", describe(element))
        elif user.rpartition("@")[2] in self._domains:  # a component of this daemon: a loop
            self._refuse(element, "not-allowed")
        elif self._allowed is not None and user != self._target_jid and not self._allowed(element.get("from", "")):
            self._refuse(element, "forbidden")
        else:
            if user == self._target_jid:
                self.target.seen(element.get("from", ""), element)
            return True
        return False

    def _drop(self, reason: str, what: str) -> None:
        self.figures.dropped[reason] += 1
        count = self.figures.dropped[reason]
        self._say_once_in(LOG_RARELY, reason, logging.WARNING, "dropped: %s: %s (%d so far)", reason, what, count)

    def _say_once_in(self, pause: float, subject: str, level: int, template: str, *arguments: object) -> None:
        if self._clock.now >= self._silent_until.get(subject, 0.0):
            self._silent_until[subject] = self._clock.now + pause
            self._say(level, template, *arguments)

    def _refuse(self, element: Element, condition: str) -> bool:
        """Answer a stanza with an error, unless it is an answer itself (RFC 6120 §8.3.1), or one that needs none."""
        name, (kind, to, from_, _) = STANZAS[element.tag], addresses_of(element.attrib)
        is_casual = name == "message" and kind in ("headline", "groupchat") and condition == "service-unavailable"
        if name == "presence" and kind == "subscribe":
            self._send(build_stanza("presence", {"type": "unsubscribed", "from": to, "to": from_}))
        elif name == "iq" and kind in ("result", "error"):
            self._drop("answer to nothing", describe(element))
        elif name != "presence" and kind != "error" and not is_casual:  # RFC 6121 §8.5.2
            self._error(name, condition, from_, to, element.get("id"))
        return False

    def _end(self, requests: Iterable[Request], condition: str) -> bool:
        """Take requests out of the open ones, and answer them; return False, as _refuse() does."""
        for request in list(requests):
            if request in self.requests.waiting:
                self.figures.unserved += 1
            self.requests.close(request)
            self._error("iq", condition, request.requester, request.asked, request.id)
        return False

    def _error(self, name: str, condition: str, to: str, from_: str, id_: Optional[str]) -> None:
        self.figures.outcomes[name][condition] += 1
        data = error_stanza(name, condition, self.jid, to, from_, id_)
        if len(data) <= self.max_send:
            self._owe(to, data)
        else:
            self._drop("error over max_send", f"to {to[:200]!r}, whose id has {len(id_ or '')} characters")

    def _owe(self, to: str, data: bytes) -> None:
        """Send an answer now, or with the next stream."""
        if self._send(data):
            return
        is_kept = False
        if len(self.backlog) < self.settings.max_pending:
            is_kept = self.backlog_bytes.add(to.partition("/")[0], len(data))
        if is_kept:
            self.backlog.append((self._clock.now, data))
        else:
            self._drop("no connection", f"an answer to {to[:200]!r}: too many wait for the next stream")

    def _send(self, data: bytes) -> bool:
        if self._stream is None:
            return False
        return self._stream.send(data)


# ----------------------------------------------------------------------------------- configuration


class Endpoint(NamedTuple):
    """Where something listens: host and port, or a unix socket (port 0, the path as host)."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" if self.port else f"unix:{self.host}"


@functools.cache  # until the next reload: one takes 16 ms and 0.9 MB
def tls_context(authorities: str) -> ssl.SSLContext:
    """Return a TLS context; authorities: certificates to trust, PEM, '' for the system's. Raises ssl.SSLError."""
    context = ssl.create_default_context(cadata=authorities or None)
    if authorities:  # Python 3.13 asks of every CA what only public ones have, and `openssl req -x509` leaves out
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def reason_of(error: Exception) -> str:
    """Return what an exception says, without its number."""
    return re.sub(r"^\[Errno -?[0-9]+\] ", "", str(error))


def read_file(path: str) -> str:
    """Return what a text file holds. Raises OSError, ValueError."""
    with open(path, encoding="utf-8-sig") as file:
        text = file.read((1 << 24) + 1)  # /dev/zero, say, has no end
    if len(text) > 1 << 24:
        raise ValueError(f"{path} has more than 16 MiB")
    return text


def read_secret(path: str) -> str:
    """Return the secret that a file holds. Raises OSError, ValueError."""
    secret = read_file(path).rstrip("\n")
    if not 0 < len(secret) <= 65536 or "\n" in secret:
        raise ValueError(f"{path} does not hold a secret in one line")
    return secret


def to_path(text: str) -> str:
    """Replace the environment's variables in a path. Raises ValueError."""
    path = os.path.expandvars(text)
    missing = re.search(r"\$\{?(\w+)", path)
    if missing is not None and missing[1] not in os.environ:
        raise ValueError(f"{text}: the variable {missing[1]} is not set")
    return path


def read_certificates(path: str) -> str:
    """Return what a file of certificates in PEM form holds. Raises OSError, ValueError."""
    text = read_file(to_path(path))
    authorities = text.encode("ascii", "replace").decode()  # comments may be in any language
    try:
        tls_context(authorities or "none")  # an empty text would be the system's
    except ssl.SSLError:
        raise ValueError(f"{path} holds no certificates in PEM form") from None
    return authorities


def is_invisible(char: str) -> bool:
    """Whether nobody can see a character: control, zero width, soft hyphen, byte order mark."""
    return unicodedata.category(char) in ("Cc", "Cf")


def lower_plain(text: str) -> str:
    """Lower-case as servers do: letters such as the Turkish dotted I, which become two, stay as they are."""
    return "".join(char.lower() if len(char.lower()) == 1 else char for char in text)


# What follows converts the text of a key to its value, or raises ValueError with what would be right.


def to_number(text: str, least: int = 1) -> int:
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) < least:
        raise ValueError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def to_seconds(text: str, least: float = 0) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or not least <= float(text) <= 86400:
        raise ValueError(f"{text!r} is not a number of seconds from {least} to 86400")
    return float(text)


def to_word(text: str, words: Iterable[str]) -> str:
    if text.lower() not in words:
        raise ValueError(f"{text!r} is none of {', '.join(words)}")
    return text.lower()


def to_relay(text: str) -> frozenset[str]:
    return frozenset(to_word(word, ("message", "presence", "iq")) for word in text.split())


def to_bare_jid(text: str) -> str:
    local, _, resource = split_jid(text)
    if not is_jid(text) or not local or resource:
        raise ValueError(f"{text!r} is not a bare JID such as some-user@some-domain.example")
    return lower_plain(text)


def to_host(text: str) -> str:
    """An IP address is taken, too, and a dot behind the last label."""
    if text and not re.fullmatch(r"[^\s.]{1,63}(\.[^\s.]{1,63})*\.?", text):
        raise ValueError(f"{text!r} is not a host's name, whose labels have at most 63 characters")
    return text


def to_endpoint(text: str) -> Endpoint:
    if re.fullmatch("unix:.+", text) and len(text.encode()) <= len("unix:") + 107:
        return Endpoint(text[5:], 0)
    match = re.fullmatch(r"(?:\[(.*:.*)\]|([^:\[\]]+)):([0-9]{1,5})", text)
    if match is None or not 0 < int(match[3]) < 65536:
        raise ValueError(f"{text!r} is not host:port or [v6]:port (1 to 65535), or unix:/path (at most 107 bytes)")
    if match[1]:
        socket.inet_pton(socket.AF_INET6, match[1].partition("%")[0])  # raises OSError
    return Endpoint(to_host(match[1] or match[2]), int(match[3]))


def to_glob(text: str) -> str:
    if not text:
        raise ValueError("is empty, which nobody matches; a lone * is for all")
    re.compile(fnmatch.translate(text))  # before Python 3.10.5 this may raise re.error
    return text


def to_globs(text: str) -> tuple[str, ...]:
    """Localpart and domain are lower-cased as in every configured JID."""
    parts = (glob.partition("/") for glob in to_glob(text).split())
    return tuple(lower_plain(bare) + slash + resource for bare, slash, resource in parts)


class Component(NamedTuple):
    """The configuration of one component: each field but `jid` is a key of the file, with what converts its text."""

    jid: str
    target_address: Annotated[str, to_bare_jid] = ""  # the implementing client's bare JID; it must be given
    server: Annotated[Endpoint, to_endpoint] = Endpoint("localhost", 5347)  # its component port
    tls: Annotated[bool, lambda text: to_word(text, ("no", "yes")) == "yes"] = False  # from the first byte, verified
    tls_ca: Annotated[str, lambda path: path and read_certificates(path)] = ""  # PEM, instead of the system's
    tls_name: Annotated[str, to_host] = ""  # the name that the certificate must be for; empty: the host of server
    secret: Annotated[str, str] = ""  # as the server has it; it, or secret_file, must be given
    secret_file: Annotated[str, to_path] = ""  # that holds the secret
    encoding: Annotated[str, functools.partial(to_word, words=("jid", "opaque"))] = "jid"  # how a requester is written
    timeout: Annotated[float, functools.partial(to_seconds, least=0.001)] = 30  # seconds for an answer
    max_pending: Annotated[int, to_number] = 10000  # open requests of the component
    max_pending_per_user: Annotated[int, to_number] = 1000  # open requests of one bare JID
    max_stanza: Annotated[int, functools.partial(to_number, least=LEAST_LIMIT)] = 4194304  # bytes of one received
    max_send: Annotated[int, to_number] = 524288  # bytes of one stanza sent
    policy: Annotated[str, functools.partial(to_word, words=POLICIES)] = "random"  # which resource gets a request
    resources: Annotated[str, to_glob] = "*"  # those of the target that may serve
    allow: Annotated[tuple[str, ...], to_globs] = ("*",)  # who is served
    relay: Annotated[frozenset[str], to_relay] = frozenset()  # what is relayed beyond the requests
    hold: Annotated[float, to_seconds] = 0  # seconds that a request waits for a resource
    keepalive: Annotated[int, functools.partial(to_number, least=5)] = 150  # seconds of silence, then a space or a ping

    @property
    def of_stream(self) -> tuple[object, ...]:
        """What cannot change without another stream."""
        return (self.target_address, self.server, self.tls, self.tls_ca, self.tls_name, self.secret, self.encoding,
                self.max_stanza)  # fmt: skip


class Configuration(NamedTuple):
    """A whole valid configuration: the fields but `components` are the keys of [clientproxy]."""

    components: dict[str, Component]
    log_level: Annotated[str, functools.partial(to_word, words=("debug", "info", "warning", "error"))] = "info"
    drain: Annotated[float, to_seconds] = 5  # seconds for open requests when it stops
    metrics: Annotated[Optional[Endpoint], lambda text: to_endpoint(text) if text else None] = None  # for HTTP

    def __str__(self) -> str:
        """Say what would run, a line a component, without secrets."""
        lines = [
            f"{c.jid}: requests go to {c.target_address} (resources {c.resources}, {c.policy}), "
            f"server {c.server}{' with TLS' if c.tls else ''}, encoding {c.encoding}, timeout {c.timeout:g} s, "
            f"hold {c.hold:g} s, relay {' '.join(sorted(c.relay)) or 'nothing'}\n"
            for c in self.components.values()
        ]
        return "".join(lines) + f"log_level {self.log_level}, drain {self.drain:g} s, metrics {self.metrics or 'off'}"


Keys = dict[str, Callable[[str], Any]]  # of a section: their names, and what converts the text of each
COMPONENT_KEYS = {key: how.__metadata__[0] for key, how in Component.__annotations__.items() if key != "jid"}
DAEMON_KEYS = {key: how.__metadata__[0] for key, how in Configuration.__annotations__.items() if key != "components"}


def sections_of(path: str) -> dict[str, dict[str, str]]:
    """Return the texts of a file's sections, of which [DEFAULT] is one like any other. Raises OSError, ValueError."""
    parser = configparser.ConfigParser(default_section="", interpolation=None, empty_lines_in_values=False)
    try:
        parser.read_string(read_file(path))
    except (configparser.DuplicateSectionError, configparser.DuplicateOptionError) as error:
        where = f"[{error.section}] {getattr(error, 'option', '')}".strip()
        raise ValueError(f"{where}: stands twice in the file, again on line {error.lineno}") from None
    except configparser.MissingSectionHeaderError as error:
        raise ValueError(f"line {error.lineno} is outside a section: [proxy.domain.example] must come first") from None
    except configparser.ParsingError as error:  # its lines may hold a secret: only their numbers
        numbers = ", ".join(str(number) for number, _ in error.errors)
        raise ValueError(f"not of the form key = value: line {numbers}") from None
    return {name: dict(parser.items(name)) for name in parser.sections()}


class ConfigurationReader:
    """Reads one file. What it remarks is for the log: each mistake, or, without any, what can hardly be meant."""

    def __init__(self, path: str) -> None:
        self.remarks: list[str] = []  # mistakes where read() returns None, else warnings
        self._path = path

    def read(self) -> Optional[Configuration]:
        """Return the configuration, or None after a mistake."""
        tls_context.cache_clear()
        try:
            sections = sections_of(self._path)
        except (OSError, ValueError) as error:  # nothing else is certain
            self.remarks.append(f"{self._path}: {reason_of(error)}")
            return None
        daemon = self._values("clientproxy", sections.pop("clientproxy", {}), DAEMON_KEYS)
        defaults = self._values("DEFAULT", sections.pop("DEFAULT", {}), COMPONENT_KEYS)  # each mistake is told once
        jids = [lower_plain(name) for name in sections]
        components = [self._component(name, texts, defaults, jids) for name, texts in sections.items()]
        if not components:
            self.remarks.append(f"{self._path}: no component: a section such as [proxy.domain.example] is needed")
        if self.remarks:
            return None
        for component in components:
            self._warn(component)
        return Configuration({component.jid: component for component in components}, **daemon)

    def _values(self, section: str, texts: dict[str, str], keys: Keys) -> dict[str, Any]:
        """Convert what a section gives; what is a mistake becomes None."""
        values: dict[str, Any] = {key: None for key in texts if key in keys}
        for key, text in texts.items():
            try:
                if key not in keys:
                    raise ValueError(f"is not a key here; there are {', '.join(keys)}")
                if "\n" in text and key not in ("allow", "relay"):
                    raise ValueError("goes on in the next line: that is indented, and must not be")
                if key != "secret" and any(map(is_invisible, text.replace("\n", ""))):
                    raise ValueError(f"{ascii(text)} holds a character that nobody can see")
                values[key] = keys[key](text)
            except (OSError, ValueError, re.error) as error:
                self._remark(section, {f"{key}: {reason_of(error)}": True})
        return values

    def _component(self, name: str, texts: dict[str, str], defaults: dict[str, Any], jids: list[str]) -> Component:
        """Return the component of a section; after a mistake it may hold None."""
        if "secret" in texts or "secret_file" in texts:  # each takes the place of the other one's default
            defaults = {**defaults, "secret": "", "secret_file": ""}
        c = Component(lower_plain(name), **{**defaults, **self._values(name, texts, COMPONENT_KEYS)})
        self._remark(name, {
            "is not a domain such as proxy.domain.example":
                not is_jid(name) or split_jid(name)[1] != name or any(map(is_invisible, name)),
            "stands twice in the file": jids.count(c.jid) > 1,
            "target_address: is missing: the implementing client's bare JID": c.target_address == "",
            "target_address: is in the domain of a component of this file: it would loop":
                split_jid(c.target_address or "")[1] in jids,
            "secret: either this one or secret_file must be given, and not both":
                (c.secret, c.secret_file).count("") != 1,
            "tls: a unix socket is not spoken to with TLS: tls = no": c.tls and c.server and not c.server.port,
            f"hold: is more than timeout = {c.timeout}, after which nobody waits":
                (c.hold or 0) > (c.timeout or NEVER),
        })  # fmt: skip
        if c.secret_file and c.secret == "":  # it is converted once more: to what the file holds
            values = self._values(name, {"secret_file": c.secret_file}, {"secret_file": read_secret})
            return c._replace(secret=values["secret_file"])
        return c

    def _warn(self, c: Component) -> None:
        """Remark on what can hardly be meant."""
        key, file = ("secret_file", c.secret_file) if c.secret_file else ("secret", self._path)
        nearby = r"(unix|localhost(\.localdomain)?\.?|ip6-localhost|127(\.[0-9]+){3}|\[::1\]):.*"
        is_public, ineffective = False, "has no effect without tls = yes"
        with contextlib.suppress(OSError):  # it may be gone by now
            is_public = os.stat(file).st_mode & stat.S_IROTH > 0
        unsure = "is not in the form that servers bring names into (RFC 3491): the server may spell it otherwise"
        self._remark(c.jid, {
            "server: without tls = yes the stanzas go to another machine in the clear":
                not c.tls and not re.fullmatch(nearby, str(c.server), re.IGNORECASE),
            f"tls_ca: {ineffective}": c.tls_ca and not c.tls,
            f"tls_name: {ineffective}": c.tls_name and not c.tls,
            unsure: not is_prepared(c.jid),
            f"target_address: {unsure}": not is_prepared(c.target_address),
            f"{key}: everybody on this machine can read {file} and the secret in it: chmod 0640": is_public,
            f"{key}: is in quotes, which are a part of it here": re.fullmatch(r"(['\"]).*\1", c.secret),
            f"{key}: holds what looks like a comment, which is a part of it here": re.search(" [#;]", c.secret),
            f"{key}: holds a character that nobody can see": any(map(is_invisible, c.secret)),
            f"{key}: is still that of the sample": c.secret == "change-me",
        })  # fmt: skip

    def _remark(self, section: str, remarks: dict[str, object]) -> None:
        """Remark on what is so."""
        self.remarks += [f"{self._path}: [{section}] {what}" for what, is_so in remarks.items() if is_so]


# -------------------------------------------------------------------- the log and the service manager

log = logging.getLogger("clientproxy")


class LineFormatter(logging.Formatter):
    """One line an event; what is not printable is escaped, so that no one can inject lines."""

    _PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}  # sd-daemon(3)

    def __init__(self, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        begin = f"<{self._PRIORITIES[record.levelname]}>"
        if not self._journal:
            begin = f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S%z')} {record.levelname.lower()}: "
        component = record.name.partition(".")[2]  # whose own logger it is: log.getChild()
        failure = self.formatException(record.exc_info)[-2048:] if record.exc_info else ""
        line = begin + ": ".join(part for part in (component, record.getMessage(), failure) if part)
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)[:4096]


def set_up_log() -> None:
    """Log to stderr, in the journal's form where stderr is the journal (systemd.exec(5), JOURNAL_STREAM)."""
    logging.raiseExceptions = False  # whoever reads stderr may be gone; that must not stop the daemon
    handler = logging.StreamHandler()
    journal = False
    with contextlib.suppress(OSError):  # stderr is closed
        status = os.fstat(2)
        journal = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    handler.setFormatter(LineFormatter(journal))
    log.handlers[:] = [handler]


def notify(message: str) -> None:
    """Tell the service manager, where there is one: sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(message.encode(), "\0" + path[1:] if path[0] == "@" else path)


def resident_memory() -> int:
    """Return the process's resident memory in bytes, 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def trim_memory() -> None:
    """Give free memory back to the system, where it has glibc, and does not forbid what ctypes needs."""
    with contextlib.suppress(ImportError, OSError, AttributeError, MemoryError):
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)


# ----------------------------------------------------------------------------------------- the loop


class Loop:
    """The event loop of one daemon.

    Theory of operation. What has arrived counts before what is late. So when something is due, the loop first takes
    turns over the sockets, one read each, until none has anything more or TURN seconds have passed. Only then what
    was due at the beginning is done; what became due during the turns waits for the next time. All callbacks run in
    the loop's thread: what another thread has found out, and a signal, are events like any other.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self._selector = selectors.DefaultSelector()
        self._watched: dict[socket.socket, int] = {}  # and for which events; the selector's own table is slow
        self._results: collections.deque[tuple[Callable[[Any], None], Any]] = collections.deque()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self.watch(self._reader, selectors.EVENT_READ, self._woken)

    def watch(self, sock: socket.socket, mask: int, callback: Callable[[int], float]) -> None:
        """Call callback(events) at these events, with a mask of 0 no longer; it returns when something is due."""
        if self._watched.get(sock, 0) == mask:
            return
        if self._watched.pop(sock, 0):
            self._selector.unregister(sock)
        if mask:
            self._watched[sock] = mask
            self._selector.register(sock, mask, callback)

    def in_thread(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Run in another thread what may block; the loop calls done() with its result, or with an OSError of it."""

        def run() -> None:
            try:
                result = work()
            except OSError as error:
                result = error
            self.hand_back(done, result)

        try:
            threading.Thread(target=run, daemon=True).start()
        except RuntimeError as error:  # the system gives no more threads
            self.hand_back(done, OSError(str(error)))

    def hand_back(self, done: Callable[[Any], None], result: Any) -> None:
        """Let the loop call done(result), and end its sleep; for any thread."""
        self._results.append((done, result))
        with contextlib.suppress(BlockingIOError):  # it is awake already
            self._writer.send(b"\0")

    def _woken(self, mask: int) -> float:
        self._reader.recv(4096)
        while self._results:
            done, result = self._results.popleft()
            done(result)
        return 0.0  # at once: whatever has changed

    def run(self, due_at: float) -> None:
        """Handle what comes until due_at, or an earlier time that a callback returns; the clock then shows when."""
        now, late_at = time.monotonic(), NEVER  # late_at: when it was first seen that something is due
        while now < late_at + TURN:
            if now >= due_at:
                late_at = min(late_at, now)
            is_late = late_at < NEVER  # from here on select() does not sleep
            events = self._selector.select(max(0.0, due_at - now))
            if is_late and not events:
                break
            for key, mask in events:
                self.clock.now = time.monotonic()
                due_at = min(due_at, key.data(mask))
            now = time.monotonic()
        self.clock.now = late_at  # back to before the turns: what became due during them is left for the next time


# ------------------------------------------------------------------------- one connection to a server

Address = tuple[int, Any]  # family and socket address


def sockets_of(endpoint: Endpoint) -> list[Address]:
    """Look an endpoint up. Raises OSError, UnicodeError."""
    if not endpoint.port:
        return [(socket.AF_UNIX, endpoint.host)]
    found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    return [(family, where) for family, _, _, _, where in found]


def connect(component: Component, family: int, where: Any) -> socket.socket:
    """Return a connected socket, with TLS where the component wants that; raise OSError with what may be wrong."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    hint = ""
    try:
        sock.settimeout(CONNECT_WITHIN)
        sock.connect(where)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if component.tls:
            name = (component.tls_name or component.server.host).rstrip(".")
            hint = f"; does the port speak TLS from the first byte, is tls_ca its CA, is {name} its name (tls_name)?"
            sock.settimeout(HANDSHAKE_WITHIN)
            sock = tls_context(component.tls_ca).wrap_socket(sock, server_hostname=name)
        sock.setblocking(False)
        return sock
    except (OSError, ValueError) as error:  # ValueError: a name that Python cannot encode
        is_late = isinstance(error, socket.timeout)
        why = f"no answer within {sock.gettimeout():.0f} s" if is_late else reason_of(error)
        sock.close()
        raise OSError(why + hint) from None


WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def receive_from(sock: socket.socket) -> tuple[bytes, str]:
    """Return what has come, and why nothing more will come, or ''.

    TLS hands out one record at a time. READ_SIZE is larger than any: so nothing of it stays behind in the buffer of
    TLS, which the selector does not see. As a server may write each stanza in a record of its own, many are read
    here: to handle each by itself would be five times the work.
    """
    data, is_tls = b"", isinstance(sock, ssl.SSLSocket)
    try:
        while not data or (is_tls and len(data) < READ_SIZE):
            piece = sock.recv(READ_SIZE)
            if not piece:
                return data, "the server closed the connection"
            data += piece
    except WOULD_BLOCK:
        pass
    except OSError as error:
        return data, f"the connection broke: {reason_of(error)}"
    return data, ""


class Outbox:
    """What is to be sent: chunks of whole stanzas, but for the first one, which may be sent in part."""

    def __init__(self) -> None:
        self.size = 0  # bytes that wait
        self.waits_since = NEVER  # since when some wait and the socket has taken nothing
        self._chunks: collections.deque[bytes] = collections.deque()
        self._offset = 0  # bytes of the first chunk that are sent
        self._recent: collections.deque[tuple[float, bytes]] = collections.deque()  # large chunks, and when they went
        self._recent_size = 0

    def send(self, sock: socket.socket, data: bytes, now: float) -> int:
        """Add whole stanzas, and send what the socket takes; return how much that was. Raises OSError."""
        if data:
            self._chunks.append(data)
            self.size += len(data)
        before = self.size
        # Of a piece of several records TLS tells nothing until all are sent: so it gets one at a time.
        most = TLS_RECORD if isinstance(sock, ssl.SSLSocket) else sys.maxsize
        with contextlib.suppress(*WOULD_BLOCK):
            while self._chunks:
                chunk = self._chunks[0]
                sent = sock.send(memoryview(chunk)[self._offset :][:most])
                self.size -= sent
                self._offset += sent
                if self._offset == len(chunk):
                    self._offset = 0
                    self._chunks.popleft()
                    if len(chunk) > LEAST_LIMIT:
                        self._recent.append((now, chunk))
                        self._recent_size += len(chunk)
        while len(self._recent) > 1 and (self._recent_size > RECENT_BYTES or now - self._recent[0][0] > RECENT):
            self._recent_size -= len(self._recent.popleft()[1])
        # The wait begins anew with whatever is taken.
        if self.size < before or self.waits_since == NEVER:
            self.waits_since = now if self.size else NEVER
        return before - self.size

    def leftover(self, now: float) -> tuple[bytes, int]:
        """Return the large chunks of the last moments and all that waits, as one; and how many bytes of it are sent."""
        recent = b"".join(chunk for when, chunk in self._recent if now - when <= RECENT)
        return recent + b"".join(self._chunks), len(recent) + self._offset


class Connection:
    """One connection to a component's server: the pause before it, the dial, the stream, the end of the socket.

    It serves one configuration and never comes back. Once it `has_ended`, its owner makes a successor, which goes on
    with the Proxy if the stream is configured as before, and else with a new one that has its figures and backlog.
    """

    def __init__(self, component: Component, domains: frozenset[str], loop: Loop, last: Optional["Connection"]) -> None:
        """domains: those of all components; last: the one that has ended, if there was one."""
        self.of_stream = component.of_stream  # what it was made for
        self.outbox = Outbox()
        self.address: Optional[Address] = None  # that serves, or served last
        self.failures = 0  # attempts without any stream, for the choice of the address
        self.longest_pause = 1.0  # that the successor may make, where the cause does not set another bound
        self._loop, self._clock = loop, loop.clock
        self._say = log.getChild(component.jid).log
        self._sock: Optional[socket.socket] = None  # from the dial's end to the connection's
        self._dial_at = loop.clock.now  # when the dial begins; NEVER: it has begun
        self._feed_at = NEVER  # when the parser gets what it has put off; 0: once the loop has read all there is
        if last is not None and last.of_stream == component.of_stream:
            self.proxy: Proxy = last.proxy
            self._pause_after(last)
        else:
            self.proxy = Proxy(component, domains, loop.clock, random.random, self._say)
            if last is not None:
                self.proxy.succeed(last.proxy)
        self.stream = ComponentStream(component, self.proxy, loop.clock)

    def _pause_after(self, last: "Connection") -> None:
        """Pause first; at random, so that many clients do not come back at once."""
        failure, ready_at = last.stream.failure, last.stream.ready_at
        was_ready, was_steady = ready_at < NEVER, self._clock.now - ready_at >= STEADY
        self.address = last.address
        self.failures = 0 if was_ready else last.failures + 1
        self.longest_pause = longest = 1.0 if was_steady else last.longest_pause
        is_refused = failure.of_server and failure.condition in REFUSALS
        if self.proxy.draining:  # there is no time
            pause = random.uniform(0.1, 1.0)
        elif is_refused:  # until somebody changes something
            pause = random.uniform(5.0, 20.0)
        elif was_ready and failure.condition not in CONNECTION_FAULTS:  # a user may have caused it
            pause = random.uniform(0.1, 1.0)
        else:
            pause = random.uniform(0.1, longest)
            self.longest_pause = min(60.0, 2 * longest)
        self._dial_at += pause
        begin = "the stream has ended" if was_ready else f"no stream to {self.proxy.settings.server}"
        self._say(logging.WARNING, "%s: %s; next attempt in %.1f s", begin, failure, pause)

    # -- what the daemon asks and wants

    @property
    def is_ready(self) -> bool:
        """Whether requests can come and go."""
        return self.stream.state is State.READY

    @property
    def has_ended(self) -> bool:
        """Whether it is of no more use."""
        return self.stream.is_ending and self._sock is None

    @property
    def memory(self) -> int:
        """How many bytes of the process's memory are there for what is under way: an estimate."""
        # With the copies that are made on the way, bytes that are kept count three times.
        kept = self.proxy.requests.stanzas.used + self.proxy.backlog_bytes.used + self.outbox.size
        return len(self.proxy.requests.table) * REQUEST_MEMORY + 3 * kept + self.stream.parser.memory

    def hurry(self) -> None:
        """End the pause; or, with a stream, send what the proxy has put into it."""
        if self._dial_at < NEVER:
            self._dial_at = self._clock.now
        self._settle()

    def stop(self) -> None:
        """Answer what is open and end the stream, or the attempt at one."""
        self.proxy.answer_all()
        self.stream.close()
        self._settle()

    # -- its life

    def next_deadline(self) -> float:
        """Return when tick() has something to do."""
        due = min(self._feed_at, self._dial_at, self.outbox.waits_since + STALL)
        return min(due, self.stream.next_deadline()) if self._may_read else due

    def tick(self) -> None:
        """Do what is due, after what has arrived."""
        now = self._clock.now
        if now >= self._feed_at and self._sock is not None:
            self._feed_at = NEVER
            self.stream.receive_deferred()
        if now >= self._dial_at:
            self._dial_at = NEVER
            self._loop.in_thread(self._dial, self._dialled)
        elif now >= self.outbox.waits_since + STALL:
            self.stream.receive_end(f"the server has taken nothing for {STALL:.0f} s")
        elif self._may_read:
            self.stream.tick()
        self._settle()

    def _dial(self) -> tuple[socket.socket, Address]:
        """Look up, connect, secure: in a thread, as that may block. Raises OSError with a text for the log."""
        component = self.proxy.settings
        try:
            addresses = sockets_of(component.server)
        except (OSError, UnicodeError) as error:
            if self.address is None:
                raise OSError(f"{component.server.host} is not resolved: {reason_of(error)}") from None
            addresses = [self.address]  # the last one may still be right
        failures = []
        first = self.failures % len(addresses)
        for family, where in addresses[first:] + addresses[:first]:
            if self.has_ended:  # nobody wants it any more
                break
            try:
                return connect(component, family, where), (family, where)
            except OSError as error:
                why = reason_of(error)
                failures.append(f"{where[0]}: {why}" if len(addresses) > 1 else why)
        raise OSError("; ".join(failures))

    def _dialled(self, result: Any) -> None:
        """The thread hands back a socket and its address, or what went wrong; after stop() nobody wants it."""
        if isinstance(result, OSError):
            self.stream.receive_end(str(result))
        elif self.has_ended:
            result[0].close()
        else:
            self._sock, self.address = result
            self.stream.open()
            self._settle()

    def _handle(self, mask: int) -> float:
        """The selector's callback. It reads once: one pass for a whole batch of stanzas."""
        sock, stream = self._sock, self.stream
        if sock is None:  # it has ended in this turn
            return 0.0
        if mask & selectors.EVENT_READ:
            data, end = receive_from(sock)
            self._trace("in: %s", data)
            self.proxy.figures.received += len(data)
            stream.receive(data)
            if end:
                stream.receive_end(end)
        self._feed_at = 0.0 if stream.parser.deferred else NEVER
        self._settle()
        return 0.0 if self.has_ended else self.next_deadline()  # at once: the daemon makes a successor

    def _settle(self) -> None:
        """Send what the stream has to say, and wait for what is to come, or close the socket."""
        sock, stream, outbox = self._sock, self.stream, self.outbox
        if sock is None:
            return
        data = stream.data_to_send()
        self._trace("out: %s", data)
        writing = 0
        try:
            self.proxy.figures.sent += outbox.send(sock, data, self._clock.now)
            writing = selectors.EVENT_WRITE if outbox.size else 0
        except OSError as error:  # reading goes on: the server may have said why
            stream.close(Fault("", f"the connection broke: {reason_of(error)}"))
        # After the server's end of the stream, what still waits can be sent until the deadline.
        if stream.state is not State.CLOSED or (writing and self._clock.now < stream.next_deadline()):
            reading = selectors.EVENT_READ if self._may_read else 0
            self._loop.watch(sock, reading | writing, self._handle)
            return
        self._loop.watch(sock, 0, self._handle)
        sock.close()
        self._sock = None
        stream.parser.release()
        self.proxy.stream_lost(stream.failure, *outbox.leftover(self._clock.now))

    @property
    def _may_read(self) -> bool:
        """Whether we read: not while too much waits to be sent. That makes the server wait, too.

        Meanwhile the stream's deadlines do not count: what they ask for may be there, unread. But once our end
        of the stream is put, the server's is waited for in any case.
        """
        return self.outbox.size <= PAUSE_READING or self.stream.is_ending

    def _trace(self, template: str, data: bytes) -> None:
        """Log the tags of stanzas, never their payloads."""
        if log.isEnabledFor(logging.DEBUG):
            for tag in re.findall(rb"<(?:iq|message|presence)\b[^>]*>", data):
                self._say(logging.DEBUG, template, tag[:800].decode("utf-8", "replace"))


# ------------------------------------------------------------------------------ figures for operators


# Name, type and help of each metric, and its value for a component: a number, one for each word, or a Histogram.
METRICS: tuple[tuple[str, str, str, Callable[[Connection], Any]], ...] = (
    ("ready", "gauge", "Whether the component's stream is ready.", lambda c: c.is_ready),
    ("requests_total", "counter", "IQ requests that have ended, by outcome.",
     lambda c: {**c.proxy.figures.outcomes["iq"], "answered": sum(c.proxy.figures.answer_seconds.counts)}),
    ("messages_total", "counter", "Messages relayed or refused.", lambda c: c.proxy.figures.outcomes["message"]),
    ("presences_total", "counter", "Presences relayed or refused.", lambda c: c.proxy.figures.outcomes["presence"]),
    ("open_requests", "gauge", "Requests without an answer yet.", lambda c: len(c.proxy.requests.table)),
    ("waiting_requests", "gauge", "Those that wait for a resource.", lambda c: len(c.proxy.requests.waiting)),
    ("waiting_unserved_total", "counter", "Requests that waited in vain.", lambda c: c.proxy.figures.unserved),
    ("backlog", "gauge", "Answers that wait for the next stream.", lambda c: len(c.proxy.backlog)),
    ("resources", "gauge", "Available resources that serve.", lambda c: len(c.proxy.target.resources)),
    ("suspect_resources", "gauge", "Those that leave requests unanswered.",
     lambda c: sum(each.timeouts >= TIMEOUTS_SUSPECT for each in c.proxy.target.resources.values())),
    ("connects_total", "counter", "Streams that became ready.", lambda c: c.proxy.figures.connects),
    ("dropped_total", "counter", "Stanzas dropped, by reason.", lambda c: c.proxy.figures.dropped),
    ("received_bytes_total", "counter", "Bytes received from the server.", lambda c: c.proxy.figures.received),
    ("sent_bytes_total", "counter", "Bytes sent to the server.", lambda c: c.proxy.figures.sent),
    ("waiting_bytes", "gauge", "Bytes waiting to be sent to the server.", lambda c: c.outbox.size),
    ("answer_seconds", "histogram", "Time from a request to its answer.", lambda c: c.proxy.figures.answer_seconds),
    ("waiting_seconds", "histogram", "Time waited for a resource.", lambda c: c.proxy.figures.waiting_seconds),
)  # fmt: skip
STARTED = time.time()
LIBXML2 = ".".join(map(str, etree.LIBXML_VERSION))


def samples_of(name: str, value: Any) -> Iterator[tuple[str, str, float]]:
    """Yield name, label and number of each sample of a metric's value; labels are our words: nothing to escape."""
    if isinstance(value, Histogram):  # its buckets hold what is at most their bound
        totals = list(itertools.accumulate(value.counts))
        for bound, total in zip((*SECOND_BUCKETS, "+Inf"), totals):
            yield f"{name}_bucket", f',le="{bound}"', total
        yield f"{name}_sum", "", value.sum
        yield f"{name}_count", "", totals[-1]
    elif isinstance(value, dict):
        label = "reason" if name == "dropped_total" else "outcome"
        for word, number in value.items():
            yield name, f',{label}="{word}"', number
    else:
        yield name, "", int(value)


def figures_line(connection: Connection) -> str:
    """Return the figures of a component as a line for the log."""
    proxy, figures = connection.proxy, connection.proxy.figures
    refused = sum(figures.outcomes["iq"].values())
    return (
        f"{'ready' if connection.is_ready else 'not connected'}, "
        f"{count_of(len(proxy.target.resources), 'resource', 'resources')}, "
        f"{count_of(len(proxy.requests.table), 'request', 'requests')} open, "
        f"{count_of(len(proxy.requests.waiting), 'request waits', 'requests wait')} for a resource, "
        f"{count_of(len(proxy.backlog), 'answer', 'answers')} in the backlog, "
        f"{sum(figures.answer_seconds.counts)} answered, {refused} refused or timed out, "
        f"{sum(figures.dropped.values())} dropped, {count_of(figures.connects, 'connect', 'connects')}, "
        f"{figures.received} bytes received, {figures.sent} sent, {connection.outbox.size} waiting"
    )


def metrics_text(connections: Iterable[Connection]) -> str:
    """Return all metrics in Prometheus's text format, version 0.0.4."""
    lines = []
    for name, kind, help_, value in METRICS:
        lines += [f"# HELP clientproxy_{name} {help_}", f"# TYPE clientproxy_{name} {kind}"]
        for connection in connections:
            for sample, label, number in samples_of(name, value(connection)):
                lines.append(f'clientproxy_{sample}{{component="{connection.proxy.jid}"{label}}} {number}')
    python = sys.version.split()[0]
    build = f'version="{__version__}",python="{python}",lxml="{etree.__version__}",libxml2="{LIBXML2}"'
    for name, labels, help_, number in (
        ("clientproxy_build_info", f"{{{build}}}", "Versions, as labels.", 1),
        ("process_start_time_seconds", "", "Start of the process, in seconds since 1970.", STARTED),
        ("process_resident_memory_bytes", "", "Resident memory.", resident_memory()),
    ):
        lines += [f"# HELP {name} {help_}", f"# TYPE {name} gauge", f"{name}{labels} {number}"]
    return "\n".join(lines) + "\n"


Texts = dict[str, tuple[str, str]]  # of each path: HTTP status and body


class Monitor:
    """GET /metrics and GET /healthz over HTTP/1.0 at one endpoint, until close().

    The loop accepts and writes the texts; a thread for each client reads the request and sends the reply, so
    that a slow client costs nobody anything. With too many clients the oldest goes.
    """

    def __init__(self, endpoint: Endpoint, loop: Loop, texts: Callable[[], Texts]) -> None:
        """Raises OSError, UnicodeError; then Python closes the socket, as nobody refers to it."""
        self.endpoint = endpoint
        self._loop, self._texts = loop, texts
        self._clients: list[socket.socket] = []  # the oldest first
        family, where = sockets_of(endpoint)[0]
        self._listener = sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        is_unix = family == socket.AF_UNIX
        if is_unix and sock.connect_ex(where) == errno.ECONNREFUSED and stat.S_ISSOCK(os.stat(where).st_mode):
            os.unlink(where)  # it was left by a daemon that was killed
        sock.bind(where)
        if is_unix:
            os.chmod(where, 0o660)  # before it listens nobody can connect
        sock.listen(HTTP_CLIENTS)
        self.accept_again()

    def close(self) -> None:
        """Accept nobody any more; replies under way are sent to their end."""
        self._loop.watch(self._listener, 0, self._accept)
        self._listener.close()
        if not self.endpoint.port:
            with contextlib.suppress(OSError):  # the next start does it
                os.unlink(self.endpoint.host)

    def accept_again(self) -> None:
        """Accept clients from now on; it stops where there are no file descriptors for them."""
        self._loop.watch(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self, mask: int) -> float:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # what cannot be accepted would wake the loop again and again
            self._loop.watch(self._listener, 0, self._accept)
            return NEVER
        self._clients = [each for each in self._clients if each.fileno() >= 0] + [sock]  # without those that are closed
        if len(self._clients) > HTTP_CLIENTS:
            with contextlib.suppress(OSError):  # the client may have gone
                self._clients.pop(0).shutdown(socket.SHUT_RDWR)  # which ends its thread
        self._loop.in_thread(functools.partial(reply_to, sock, self._texts()), lambda result: sock.close())
        return NEVER


def reply_to(sock: socket.socket, texts: Texts) -> None:
    """Read an HTTP request and answer it, each within HTTP_WITHIN. Raises OSError if the client does not play along."""
    deadline = time.monotonic() + HTTP_WITHIN
    request = b""
    while not re.search(rb"\r?\n\r?\n", request) and len(request) <= HTTP_REQUEST:
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        data = sock.recv(HTTP_REQUEST)
        if not data:
            break
        request += data
    method, path, *_ = [*request.decode("latin-1").split(), "", ""]
    status, text = texts.get(path.partition("?")[0], ("404 Not Found", "there are /metrics and /healthz\n"))
    if method not in ("GET", "HEAD"):
        status, text = "405 Method Not Allowed\r\nAllow: GET, HEAD", "only GET and HEAD\n"
    body = text.encode()
    head = f"HTTP/1.0 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {len(body)}"
    sock.settimeout(HTTP_WITHIN)
    sock.sendall(head.encode() + b"\r\nConnection: close\r\n\r\n" + (b"" if method == "HEAD" else body))


# --------------------------------------------------------------------------------------- the daemon


class Daemon:
    """All components, and what they share: signals, reload, stop, renewal of memory, the service manager.

    Theory of operation. The configuration says which components there are to be, `_connections` which there are. What
    a reload changes in place, the Proxy does. Any other change, a removal and the end of the daemon are one and
    the same: the Connection is not wanted any more, and is stopped. When one has ended, for whatever reason, and is
    still wanted, a successor is made.

    Memory is renewed so: lxml keeps every name that it ever saw in a dictionary of the thread. When the memory has
    grown, the parsers let go of lxml and the loop's thread ends; the next one goes on with everything else as it is.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, path: str, verbose: bool) -> None:
        self._path = path
        self._verbose = verbose
        self._loop = Loop()
        self._monitor: Optional[Monitor] = None
        self._configuration = Configuration({})  # until the file is read
        self._reader: Optional[ConfigurationReader] = None  # the latest: only that one counts
        self._connections: dict[str, Connection] = {}
        self._stop_at = NEVER  # when it ends, whatever is still open; NEVER: it is not to end
        self._announce_at = time.monotonic() + ANNOUNCE_WITHIN
        self._told = ""  # to the service manager

    def run(self) -> NoReturn:
        """Run the loop, in one thread after the other, until a signal ends the process."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self._SIGNALS)  # in all threads, which inherit it; one waits for them
        threading.Thread(target=self._wait_for_signals).start()
        self._loop.hand_back(self._attend, signal.SIGHUP)  # the start is a reload
        while True:
            thread = threading.Thread(target=self._run_loop)
            thread.start()
            thread.join()  # then the next one begins, and can reuse the memory that this one has freed
            trim_memory()

    def _wait_for_signals(self) -> None:
        endings = 0
        while True:
            ending = signal.sigpending() & {signal.SIGTERM, signal.SIGINT}  # they come before the others
            number = signal.sigwait(ending or self._SIGNALS)
            self._loop.hand_back(self._attend, number)
            time.sleep(0.01)  # meanwhile the system keeps one of each kind, however many come
            endings += number in (signal.SIGTERM, signal.SIGINT)
            if endings > 1:  # the loop ends at once; unless it hangs, as nobody reads the log, say
                time.sleep(1.0)
                os._exit(0)

    def _run_loop(self) -> None:
        """Live as long as a thread: until lxml's memory has grown; then the next thread goes on."""
        before = {jid: connection.proxy.figures.received for jid, connection in self._connections.items()}
        due_at, most_memory = 0.0, self._unaccounted_memory() + MEMORY_HEADROOM
        while self._unaccounted_memory() <= most_memory:
            notify("WATCHDOG=1")
            if self._monitor is not None:
                self._monitor.accept_again()
            look_at = time.monotonic() + HOUSEKEEPING
            while self._loop.clock.now < look_at:
                self._loop.run(min(due_at, look_at))
                due_at = self._tick(self._loop.clock.now)
        most, jid = max(((connection.proxy.figures.received - before.get(jid, 0), jid)
                         for jid, connection in self._connections.items()), default=(0, "nobody"))  # fmt: skip
        log.info("the memory has grown: the parsers are renewed; most has come through %s, %d MiB", jid, most >> 20)
        for connection in self._connections.values():
            connection.stream.parser.release()
        gc.collect()  # lxml's objects must end in their thread

    def _unaccounted_memory(self) -> int:
        """Return how much memory there is beyond what is under way: lxml's names, and the program itself."""
        return resident_memory() - sum(connection.memory for connection in self._connections.values())

    def _tick(self, now: float) -> float:
        """Do what is due; return when something will be."""
        for connection in self._connections.values():
            if now >= connection.next_deadline():
                connection.tick()
        self._match_connections(now)
        if self._stop_at == NEVER:
            self._report(now)
        elif not self._connections:
            self._serve_http(None)
            log.info("stopped")
            os._exit(0)  # at once: while Python takes itself apart, a thread that still dials would kill it
        stop_at = self._stop_at if now < self._stop_at else NEVER  # once past, it is due no more: streams are ending
        return min([stop_at, *(connection.next_deadline() for connection in self._connections.values())])

    def _match_connections(self, now: float) -> None:
        """Stop connections that are not wanted; forget those that have ended, or make their successors."""
        components = self._configuration.components
        for jid, connection in list(self._connections.items()):
            component = components.get(jid)
            if self._stop_at < NEVER and (not connection.proxy.owed or now >= self._stop_at):
                component = None  # not wanted any more: it has nothing to do, or no time to do it
            if component is None or component.of_stream != connection.of_stream:
                connection.stop()
            if connection.has_ended and component is not None:
                self._connections[jid] = Connection(component, frozenset(components), self._loop, connection)
            elif connection.has_ended:
                del self._connections[jid]
                if connection.proxy.owed:
                    unanswered = count_of(connection.proxy.owed, "request stays", "requests stay")
                    log.warning("%s: %s unanswered: there is no connection", jid, unanswered)

    def _report(self, now: float) -> None:
        """Tell the service manager of what has changed, once there is a configuration."""
        message = f"STATUS={self._health()[1]}" if self._connections else ""
        are_tried = all(each.failures or each.proxy.figures.connects for each in self._connections.values())
        if message and (are_tried or now >= self._announce_at):
            message = f"READY=1\n{message}"
        if message != self._told:
            self._told = message
            notify(message)

    def _health(self) -> tuple[str, str]:
        """Return an HTTP status, and a sentence for people."""
        ready = {jid for jid, connection in self._connections.items() if connection.is_ready}
        waiting = [jid for jid in self._configuration.components if jid not in ready]
        if waiting:
            return "503 Service Unavailable", f"not ready: {' '.join(waiting)}"
        return "200 OK", count_of(len(ready), "component is ready", "components are ready")

    def _http_texts(self) -> Texts:
        status, sentence = self._health()
        return {"/metrics": ("200 OK", metrics_text(self._connections.values())), "/healthz": (status, f"{sentence}\n")}

    def _serve_http(self, endpoint: Optional[Endpoint]) -> bool:
        """Answer HTTP there, None: nowhere. Where that fails, do so at the old endpoint again, and return False."""
        old = self._monitor.endpoint if self._monitor is not None else None
        if endpoint == old:
            return True
        if self._monitor is not None:
            self._monitor.close()  # first, as the new address may include the old one (0.0.0.0, say)
            self._monitor = None
        try:
            self._monitor = Monitor(endpoint, self._loop, self._http_texts) if endpoint is not None else None
            return True
        except (OSError, ValueError) as error:
            log.error("[clientproxy] metrics: %s cannot be bound: %s", endpoint, reason_of(error))
        self._serve_http(old)  # it was closed above
        return False

    # -- signals

    def _attend(self, number: int) -> None:
        """Act on a signal."""
        if number == signal.SIGUSR1:
            for jid, connection in self._connections.items():
                log.info("%s: figures: %s", jid, figures_line(connection))
        elif number != signal.SIGHUP:
            self._stop()
        elif self._stop_at == NEVER:
            if self._connections:
                notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            reader = self._reader = ConfigurationReader(self._path)
            self._loop.in_thread(reader.read, lambda result: self._reload(reader, result))  # its mount may hang

    def _stop(self) -> None:
        """Drain: refuse what is new, wait for what is open; the second time, end at once."""
        if self._stop_at < NEVER:
            log.warning("a second signal: stopping at once")
            self._connections.clear()
            return
        self._stop_at = self._loop.clock.now + self._configuration.drain
        for connection in self._connections.values():
            connection.proxy.drain()
            connection.hurry()
        owed = sum(connection.proxy.owed for connection in self._connections.values())
        log.info("stopping within %g s: %s", self._configuration.drain, count_of(owed, "open request", "open requests"))
        notify("STOPPING=1\nSTATUS=stopping")

    def _reload(self, reader: ConfigurationReader, result: Any) -> None:
        """Let a configuration take effect; connections that it has no place for, _match_connections() sees."""
        if reader is not self._reader or self._stop_at < NEVER:
            return
        self._told = ""  # the service manager waits to be told again
        for remark in reader.remarks:
            log.log(logging.ERROR if result is None else logging.WARNING, "%s", remark)
        if isinstance(result, OSError):  # there was no thread to read it in
            log.error("%s", result)
        if not isinstance(result, Configuration) or not self._serve_http(result.metrics):
            if not self._connections:  # this was the start
                os._exit(1 if result else os.EX_CONFIG)  # None: the file is wrong; else it was no mistake of the file
            log.error("the configuration stays as it was")
            return
        old, new, self._configuration = self._configuration.components, result.components, result
        log.setLevel("DEBUG" if self._verbose else result.log_level.upper())
        changed = sum(old.get(jid) != component for jid, component in new.items())
        if old:
            log.info("reloaded: %s, %d of them new or changed", count_of(len(new), "component", "components"), changed)
        elif _SLOW_LOOK_UP:
            log.info("libxml2 %s is slow with elements of very many attributes: where users are not trusted, install a "
                     "newer lxml (pip install lxml)", LIBXML2)  # fmt: skip
        for jid, component in new.items():
            connection = self._connections.get(jid)
            if connection is None:
                self._connections[jid] = Connection(component, frozenset(new), self._loop, None)
            elif component.of_stream == connection.of_stream:
                connection.proxy.reconfigure(component, frozenset(new))
                connection.hurry()


# --------------------------------------------------------------------------------------------- main


def print_on(descriptor: int, text: str) -> None:
    """Print a text, whether or not anybody reads it."""
    with contextlib.suppress(OSError):
        os.write(descriptor, f"{text}\n".encode("utf-8", "backslashreplace"))


def crashed(kind: type[BaseException], failure: Optional[BaseException], trace: Any) -> None:
    """End the process for an error of this program itself: sys.excepthook."""
    log.critical("an error of this program itself", exc_info=failure)
    os._exit(1)


def main(arguments: Optional[list[str]] = None) -> int:
    """Run as the command line says; return the exit status. A wrong command line exits with 2."""
    parser = argparse.ArgumentParser(
        description="XMPP component that hands IQ requests to the resources of a client and its answers back.",
        epilog="Signals: SIGTERM and SIGINT stop, SIGHUP reloads the configuration, SIGUSR1 logs figures.",
    )
    parser.add_argument("-c", "--config", metavar="FILE", default="/etc/clientproxy.conf", help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="check the configuration and say what would run")
    parser.add_argument("-v", "--verbose", action="store_true", help="log everything, secrets and payloads apart")
    parser.add_argument("--version", action="version", version=f"clientproxy {__version__} (lxml {etree.__version__})")
    options = parser.parse_args(arguments)
    set_up_log()
    sys.excepthook = crashed
    threading.excepthook = lambda failure: crashed(*failure[:3])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # else it is a traceback while a file is read that hangs
    if not options.check:
        return Daemon(options.config, options.verbose).run()
    reader = ConfigurationReader(options.config)
    configuration = reader.read()
    for remark in reader.remarks:
        if configuration is None:
            print_on(2, remark)
        else:
            log.warning("%s", remark)
    if configuration is None:
        return os.EX_CONFIG
    print_on(1, str(configuration))
    return 0


if __name__ == "__main__":
    sys.exit(main())
