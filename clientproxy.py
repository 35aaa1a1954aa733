#!/usr/bin/env python3
"""clientproxy: a service that lives in an XMPP client, reached through a component.

An IQ request to the component is handed to one resource of an ordinary account, the implementing
client; its answer goes back to the requester from the address that was asked:

    user                        component (this daemon)                 implementing client
    ----                        -----------------------                 -------------------
    get  id=1234 ------------>  choose a resource, encode the sender
      from user@d/abc           get  id=1234  ----------------------->  from proxy.d/user@d/abc
      to   proxy.d                                                      to   some-user@d/a
                                look up the open request  <-----------  result id=1234
    result id=1234 <----------  decode the sender                       from some-user@d/a
      from proxy.d                                                      to   proxy.d/user@d/abc
      to   user@d/abc

The exchange of addresses is called JAT, Jabber Address Translation, and the resource that stands
for the requester is the encoded-from. The idea and the terms are those of Prosody's
mod_client_proxy; this program needs of a server no more than XEP-0114, which all of them have.

Implemented: XEP-0114 §3 (handshake); of RFC 6120 §4 streams, §4.9.3 stream errors, §8.1 attributes
and §8.2.3 rules of IQs, §8.3.3 stanza errors, §11.1 restricted XML, §13.12 size limits; of RFC 6121
§3 subscriptions and §4 presence; XEP-0199 as a sign of life. Deliberately not: SASL and resource
binding (a component has none), service discovery (the implementing client answers it), roster
storage (the server has it), message archives and blocking (the same).

Read from top to bottom: constants, addresses and errors; StreamParser (bytes to stanzas and back,
everything that lxml asks for); ComponentStream (XEP-0114 as a table); the JAT tables; the roster of
resources and the policies; Proxy (the rules); the configuration; then the part that touches the
outside: Link, Monitor, Daemon, main. Up to the configuration nothing opens a socket, reads a clock
or writes a log: `now` is handed in, in seconds of a monotonic clock, and what is to be sent is
returned.
"""

from __future__ import annotations

import argparse
import collections
import configparser
import errno
import fnmatch
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
import stat
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable
from enum import Enum
from typing import Any, Callable, NamedTuple, Optional, Protocol, Union
from xml.parsers import expat

from lxml import etree

__version__ = "1.0"

# ------------------------------------------------------------------------------------ constants

NS_COMPONENT = "jabber:component:accept"
NS_CLIENT = "jabber:client"  # jabberd2 writes every stanza to a component in it
NS_STREAM = "http://etherx.jabber.org/streams"
NS_STREAM_ERRORS = "urn:ietf:params:xml:ns:xmpp-streams"
NS_STANZA_ERRORS = "urn:ietf:params:xml:ns:xmpp-stanzas"
XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"

STREAM = f"{{{NS_STREAM}}}stream"
STREAM_ERROR = f"{{{NS_STREAM}}}error"
STREAM_FEATURES = f"{{{NS_STREAM}}}features"
HANDSHAKE = f"{{{NS_COMPONENT}}}handshake"
STANZAS = {f"{{{ns}}}{name}": name for ns in (NS_COMPONENT, NS_CLIENT) for name in ("iq", "message", "presence")}
TOP_LEVEL = frozenset((STREAM_ERROR, STREAM_FEATURES, HANDSHAKE, *STANZAS))

BOM = b"\xef\xbb\xbf"
TLS_RECORD = 16384  # bytes, RFC 8446 §5.1
READ_SIZE = 65536  # bytes; larger reads make the parser slower
MAX_HEADER = 65536  # bytes of the server's stream header
MAX_RESOURCE = 1023  # bytes of a resourcepart, RFC 7622 §3.4
MAX_RESOURCES = 10_000  # resources of one target that are known at a time
MAX_STICKY = 65_536  # requesters whose resource is remembered
MAX_TOKENS = 100_000  # opaque tokens of users who have no request open
CATCH_UP = 8 << 20  # bytes read before something is declared late
TIMEOUTS_AT_ONCE = 1000  # then what is to be sent goes out first
PAUSE_READING = 1 << 20  # bytes waiting at which no more is read from that server
LONG_ID = 256  # characters; the ids over it share MAX_LONG_IDS characters in the open requests
MAX_LONG_IDS = 16 << 20
NEVER = float("inf")

GRACE = 3.0  # s of a new stream in which presence may still be under way
ASK_AGAIN_MAX = 300.0  # s between two rounds of subscribe and probe
ORPHANS_KEPT = 600.0  # s for which requests of a lost connection wait for the next one
DOUBT_EVERY, DOUBT_FOR = 60.0, 10.0  # s between two probes after service-unavailable, s to wait for the answer
TIMEOUTS_SUSPECT = 3  # timeouts in a row after which a resource is the last choice
LOG_DROPS_EVERY = 60.0  # s between two log lines about the same kind of dropped stanza

SILENCE = 150.0  # s; then a space (XEP-0114 servers drop idle components) or, for the peer's silence, a ping
PING_WITHIN = 60.0  # s; together with SILENCE a dead connection is noticed within 5 minutes
CONNECT_WITHIN, HANDSHAKE_WITHIN, RESOLVE_WITHIN = 5.0, 15.0, 5.0
STALL = 60.0  # s without a byte taken by the server while output waits
LINGER, LINGER_FAULT = 2.0, 0.5  # s to wait for the peer's end of the stream
STEADY = 60.0  # s a stream must have been ready for the pauses to begin again at 1 s
# An old libxml2 gets slow with the names that it has seen, so there the renewal comes earlier.
MEMORY_HEADROOM = (96 if etree.LIBXML_VERSION >= (2, 12) else 32) << 20  # bytes over the level at the loop's start
BYTES_PER_REQUEST = 2048  # what an open request may account for, at most
HTTP_CLIENTS, HTTP_WITHIN, HTTP_REQUEST = 32, 5.0, 8192

ANSWER_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

Element = etree._Element
Attributes = Any  # of lxml: a mapping of str to str; keys may be bytes, which is faster by one encoding
Say = Callable[..., None]  # say(level, template, *arguments): one line for the log
tostring = etree.tostring

# ------------------------------------------------------- addresses (RFC 7622) and errors (RFC 6120)

# The conditions that this daemon answers with, each with its type (RFC 6120 §8.3.3).
CONDITIONS = {
    "bad-request": "modify",
    "conflict": "cancel",
    "feature-not-implemented": "cancel",
    "forbidden": "auth",
    "item-not-found": "cancel",
    "not-allowed": "cancel",
    "policy-violation": "modify",
    "recipient-unavailable": "wait",
    "remote-server-timeout": "wait",
    "resource-constraint": "wait",
    "service-unavailable": "cancel",
}

# Stream errors that mean that the server's or this daemon's configuration is wrong, with the remedy.
REFUSALS = {
    "not-authorized": "the server refused the secret: make `secret` the same as the server's (component_secret in "
    "Prosody, password of the ejabberd_service listener)",
    "host-unknown": "the server does not know this component: add it to the server's configuration (Component in "
    "Prosody, hosts of the ejabberd_service listener) or correct the section's name",
    "conflict": "another connection serves this component already: stop the other daemon, or leave this one waiting "
    "as its standby",
}

# Stream errors that a stanza can cause; a remote user must not be able to stretch the pause after them.
STANZA_FAULTS = frozenset((
    "bad-format", "bad-namespace-prefix", "improper-addressing", "internal-server-error", "invalid-from",
    "invalid-namespace", "invalid-xml", "not-well-formed", "policy-violation", "restricted-xml",
    "unsupported-encoding", "unsupported-feature", "unsupported-stanza-type", "xml-not-well-formed",
))  # fmt: skip

# What RFC 7622 §3.3 forbids in a localpart, and what no domain of ours may contain.
_LOCALPART = re.compile(r"[^\s\"&'/:<>@\x00-\x20\x7f]+")
_DOMAIN = re.compile(r"(?!.{1024})[^\s\"&'/:<>@\\(),;\[\]\x00-\x20\x7f.]+(\.[^\s\"&'/:<>@\\(),;\[\]\x00-\x20\x7f.]+)*")


def split_jid(jid: str) -> tuple[str, str, str]:
    """Return localpart, domainpart and resourcepart of a JID, each '' where absent (RFC 7622 §3.1)."""
    bare, _, resource = jid.partition("/")
    local, at, domain = bare.partition("@")
    return (local, domain, resource) if at else ("", bare, resource)


def is_jid(text: str) -> bool:
    """Whether a text has the form of a JID: [localpart@]domainpart[/resourcepart]."""
    local, domain, resource = split_jid(text)
    fits = all(len(part.encode()) <= MAX_RESOURCE for part in (local, domain, resource))
    return bool(
        fits
        and _DOMAIN.fullmatch(domain)
        and ("@" in text.partition("/")[0]) == bool(local)
        and (not local or _LOCALPART.fullmatch(local))
        and ("/" in text) == bool(resource)
    )


_ESCAPES = str.maketrans({
    "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&apos;", "\n": "&#10;", "\r": "&#13;", "\t": "&#9;",
})  # fmt: skip


def quoted(text: str) -> str:
    """Return a text as an attribute's value, in quotes (xml.sax.saxutils would bring in urllib: 60 ms, 4 MB)."""
    return f"'{text.translate(_ESCAPES)}'"


def stanza(name: str, attributes: dict[str, Optional[str]], content: str = "") -> bytes:
    """Return a stanza of the daemon's own; attributes of value None are left out, content is XML."""
    head = "".join(f" {key}={quoted(value)}" for key, value in attributes.items() if value is not None)
    return (f"<{name}{head}>{content}</{name}>" if content else f"<{name}{head}/>").encode()


def error_stanza(name: str, condition: str, to: str, from_: str, id_: Optional[str]) -> bytes:
    """Return a stanza of type error (RFC 6120 §8.3) with a condition of CONDITIONS."""
    error = f"<error type='{CONDITIONS[condition]}'><{condition} xmlns='{NS_STANZA_ERRORS}'/></error>"
    return stanza(name, {"type": "error", "id": id_, "from": from_, "to": to}, error)


def condition_of(element: Element, namespace: str) -> str:
    """Return the name of the first condition of a namespace among the children of an error, or ''."""
    prefix = f"{{{namespace}}}"
    for child in element:
        if isinstance(child.tag, str) and child.tag.startswith(prefix) and child.tag != prefix + "text":
            return child.tag[len(prefix) :]
    return ""


def error_condition(stanza: Element) -> str:
    """Return the defined condition of a stanza of type error (RFC 6120 §8.3.3), or ''."""
    for child in stanza:
        if child.tag in (f"{{{NS_COMPONENT}}}error", f"{{{NS_CLIENT}}}error"):
            return condition_of(child, NS_STANZA_ERRORS)
    return ""


def describe(element: Element) -> str:
    """Return the start of a stanza for the debug log: its name and addresses, never its payload."""
    name = str(element.tag).rpartition("}")[2]
    given = ((key, element.get(key)) for key in ("type", "id", "from", "to"))
    return " ".join([name, *(f"{key}={value!r}" for key, value in given if value)])


# ------------------------------------------------------------------------- the stream's XML (lxml)


# libxml2 2.9 writes the names of namespaces as they are: with & or < in one, what it writes is not well-formed.
_RAW_NAMESPACES = b"&amp;" not in tostring(etree.fromstring("<a xmlns='urn:&amp;'/>"))


def is_sound(data: bytes) -> bool:
    """Whether what was written of an element is well-formed, namespaces included."""
    try:
        expat.ParserCreate(namespace_separator="\f").Parse(data, True)
    except expat.ExpatError:
        return False
    return True


def written(element: Element) -> bytes:
    """Return an element as bytes, mended where _RAW_NAMESPACES matters and its size is reasonable."""
    data = tostring(element, encoding="utf-8", with_tail=False)
    if _RAW_NAMESPACES and not is_sound(data):
        elements = list(itertools.islice(element.iter(), 200))
        for uri in {uri for each in elements for uri in each.nsmap.values() if "&" in uri or "<" in uri}:
            data = data.replace(f'="{uri}"'.encode(), f'="{uri.translate(_ESCAPES)}"'.encode())
    return data


class Fault(NamedTuple):
    """Why a stream cannot go on: a condition of RFC 6120 §4.9.3, an explanation, who caused it."""

    condition: str
    detail: str
    sender: Optional[str] = None  # '': nobody but the server
    of_server: bool = False  # the server has said so


class StreamParser:
    """The server's half of a stream: bytes in, stanzas out; and the stanzas that stay, as bytes again.

    The parse tree is the outbox. feed() returns the stanzas that have become complete, children of
    the root; who does not want one sent on discards it, who does rewrites it where it stands; and
    take_output() serialises what is left with one call for the whole read. That is both the fastest
    way and the one that keeps namespaces right: lxml rewrites those of an element that it moves.

    libxml2 appends text to the last child of the open element by a pointer and a length that it
    remembers. So whenever it is fed, the root's last child must be an element or nothing (feed()
    sees to it), and a last child that may be half parsed is never removed (take_output() does).

    After a fault the stanzas before it are still good; the parser must not be fed again.
    """

    _OPTIONS: Any = {"encoding": "utf-8", "collect_ids": False, "huge_tree": True, "resolve_entities": "internal"}
    _DECLARED = re.compile(rb"""<\?xml\s[^>]*?encoding\s*=\s*["']([^"']*)["']""")
    _MARK = "<!---->"  # cannot occur otherwise: comments are refused, and `<` is escaped
    _UNDECLARED_ENTITY = (26, 27)  # libxml2's error and warning
    _NAMESPACE_ERRORS = range(200, 206)  # XML_NS_ERR_…: a prefix without declaration, and the like
    _LOG_WATCHED = 1000  # entries; looking at the log costs time by its length, and old versions fill it
    _END = "</stream:stream>"

    def __init__(self, max_stanza: int) -> None:
        """max_stanza: bytes of one stanza, enforced with up to one read of slack."""
        self.root: Optional[Element] = None  # once the header has come
        self.fault: Optional[Fault] = None
        self.closed = False  # the peer has ended its stream
        self.lang: Optional[str] = None  # the header's xml:lang
        self._max_stanza = max_stanza
        self._size = 0  # bytes since the last complete stanza, without the read that completed it
        self._log_length = 0
        self._escapes = False  # something escaped has come, perhaps in the name of a namespace
        self._settled = True  # and the last read had none, but the end of what began before it
        self._last: Optional[Element] = None  # the last complete child of the root
        self._under_way: Optional[Element] = None  # the child of the root that has begun and not ended
        self._header = b""
        self._header_fed = 0
        self._probe: Any = etree.XMLPullParser(("start", "comment", "pi"), **self._OPTIONS)
        self._parser: Any = None

    def feed(self, data: bytes) -> list[Element]:
        """Parse bytes; return the elements that have become complete at the stream's top level."""
        root = self.root
        if root is None:
            data = self._feed_header(data)
            root = self.root
            if root is None:
                return []
        root.text = None
        if len(root):
            root[-1].tail = None
        try:
            self._parser.feed(data)
        except etree.XMLSyntaxError as error:
            self.fault = self._syntax_fault(error)
        events = list(self._parser.read_events())
        # Nearly always every event is the end of a stanza.
        complete = [element for event, element in events if event == "end" and element.getparent() is root]
        if len(complete) < len(events):
            complete = self._sift(events)
        if self._log_length <= self._LOG_WATCHED and len(self._parser.feed_error_log) > self._log_length:
            self._check_namespaces(complete)
        if _RAW_NAMESPACES:
            escapes = b"&" in data
            self._settled = bool(complete) and not escapes
            self._escapes = self._escapes or escapes
        self._count(data, complete)
        self._under_way = self._open_child()
        if self.fault is not None and self.fault.sender is None:
            self.fault = self.fault._replace(sender=self._sender(self._under_way))
        return complete

    def discard(self, element: Element) -> None:
        """Take a complete stanza out of the tree: it is not to be sent on."""
        if self.root is not None:
            self.root.remove(element)

    def take_output(self, kept: int, max_send: int, unsendable: Callable[[Element], None]) -> bytes:
        """Return the `kept` stanzas that were not discarded as bytes, and empty the tree.

        A stanza of more than max_send bytes, or that cannot be written, is handed to unsendable() instead.
        """
        root = self.root
        if root is None:
            return b""
        rest = len(root) - kept  # 1: a stanza under way; anything else is a fault
        if rest:
            rest = self._check_rest(kept)
        output = self._serialise(root, kept, rest) if kept else b""
        if len(output) > max_send or self._escapes:
            good, mended = self._remove_unsendable(kept, max_send, unsendable)
            if good < kept:
                output = (self._serialise(root, good, rest) if good else b"") + mended
        if rest:
            del root[:-1]
        else:
            del root[:]
            self._escapes = self._escapes and not self._settled  # they may stand in a start tag that goes on
        self._last = None
        return output

    # -- the header

    def _feed_header(self, data: bytes) -> bytes:
        """Take bytes up to the end of the header's start tag; return those behind it.

        They are fed up to each `>` only: a document type (refused by RFC 6120 §11.1) or a
        declared encoding must be seen before libxml2 acts on it.
        """
        self._header += data
        if not self._header_begins_well():
            return b""
        while self.fault is None:
            end = self._header.find(b">", self._header_fed) + 1
            if not end:
                break
            if b"<!" in self._header[:end]:
                self.fault = Fault("restricted-xml", "a document type or a comment before the stream header")
            elif self._header_piece(self._header[self._header_fed : end]):
                return self._start_parsing(end)
            self._header_fed = end
        if self.fault is None and len(self._header) > MAX_HEADER:
            self.fault = Fault("policy-violation", f"a stream header of more than {MAX_HEADER} bytes")
        return b""

    def _header_begins_well(self) -> bool:
        head = self._header
        declared = self._DECLARED.match(head, len(BOM) if head.startswith(BOM) else 0)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[: head.find(b">") + 2]:
            self.fault = Fault("unsupported-encoding", "the server does not write UTF-8 (RFC 6120 §11.6)")
        elif declared and declared[1].lower() != b"utf-8":
            self.fault = Fault("unsupported-encoding", f"the server declares {declared[1].decode('latin-1')}")
        elif head.lstrip(BOM + b" \t\r\n")[:1] not in (b"", b"<"):
            self.fault = Fault("not-well-formed", "what the server sends is not XML; is this its component port?")
        return self.fault is None

    def _header_piece(self, piece: bytes) -> bool:
        """Whether the header's start tag ends with this piece and is what it should be."""
        try:
            self._probe.feed(piece)
        except etree.XMLSyntaxError as error:
            self.fault = self._syntax_fault(error)
        for event, element in self._probe.read_events():
            if event != "start":
                self.fault = Fault("restricted-xml", f"a {event} before the stream header")
            elif element.tag != STREAM or element.nsmap.get(None) != NS_COMPONENT:
                self.fault = Fault("invalid-namespace", f"the server's stream is not one of {NS_COMPONENT}")
            elif not element.get("id"):
                self.fault = Fault("bad-format", "the server's stream header has no id")
            else:
                return self.fault is None
            break
        return False

    def _start_parsing(self, end: int) -> bytes:
        tags = (STREAM, *TOP_LEVEL)  # nested elements then cost no Python object
        self._parser = etree.XMLPullParser(("end", "comment", "pi"), tag=tags, **self._OPTIONS)
        # A comment of our own leads to the root. A start event would, too, but then every stanza had one.
        self._parser.feed(self._header[:end] + self._MARK.encode())
        for event, element in self._parser.read_events():
            self.root = element.getroottree().getroot()
            self.closed = self.closed or event == "end"
        root = self.root
        assert root is not None
        del root[:]  # the comment
        self.lang = root.get(XML_LANG)
        nsmap: Any = root.nsmap
        # Only where the server's root declares the prefixes of ours can the tree be cut out of it.
        self._plain = nsmap == {None: NS_COMPONENT, "stream": NS_STREAM}
        self._start_tag = len(tostring(root, encoding="unicode")) - 1  # <.../> is a character longer than <...>
        rest, self._header, self._probe = self._header[end:], b"", None
        return rest

    # -- bounds and faults

    def _sift(self, events: list[tuple[str, Element]]) -> list[Element]:
        """Return the complete stanzas where an event is something else: a stanza in a stanza, a comment, the end."""
        complete = []
        for event, element in events:
            if event != "end":  # RFC 6120 §11.1: no comments, no processing instructions
                self.fault = Fault("restricted-xml", f"a {event} in the stream", self._sender(element))
                break
            if element.getparent() is self.root:
                complete.append(element)
            elif element is self.root:
                self.closed = True
        return complete

    def _count(self, data: bytes, complete: list[Element]) -> None:
        """Bound the bytes of an unfinished stanza (RFC 6120 §13.12)."""
        root = self.root
        if complete:
            self._last = complete[-1]
            self._size = 0
        elif root is not None and root.text and not len(root):
            self._size = 0  # text between stanzas, such as white space that keeps the connection alive
        else:
            self._size += len(data)
            if self._size > self._max_stanza and self.fault is None:
                self.fault = Fault("policy-violation", f"a stanza of more than max_stanza = {self._max_stanza} bytes")

    def _open_child(self) -> Optional[Element]:
        root = self.root
        if root is None or not len(root) or root[-1] is self._last:
            return None
        return root[-1]

    def _sender(self, node: Optional[Element]) -> str:
        """Return who has sent the stanza that a node stands in, '' where it stands in none."""
        while node is not None:
            parent = node.getparent()
            if parent is self.root:
                return node.get("from") or ""
            node = parent
        return ""

    def _syntax_fault(self, error: etree.XMLSyntaxError) -> Fault:
        entity = getattr(error, "code", 0) in self._UNDECLARED_ENTITY  # RFC 6120 §11.1: only the predefined ones
        return Fault("restricted-xml" if entity else "not-well-formed", str(error.msg))

    def _check_namespaces(self, complete: list[Element]) -> None:
        """Errors of namespaces raise nothing, they stand in a log; what has them cannot be sent on."""
        log = self._parser.feed_error_log
        wrong = [entry for entry in list(log)[self._log_length :] if entry.type in self._NAMESPACE_ERRORS]
        self._log_length = len(log)
        if not wrong:
            return
        self.fault = Fault("not-well-formed", wrong[0].message)
        for place, element in enumerate(complete):
            if not is_sound(written(element)):
                self.fault = self.fault._replace(sender=element.get("from") or "")
                del complete[place:]
                break

    def _check_rest(self, kept: int) -> int:
        """Find elements that are no stanzas (RFC 6120 §4.9.3.24); return the children behind the kept ones."""
        root = self.root
        assert root is not None
        last = root[-1]
        if len(root) == kept + 1 and last is self._under_way and last.tag in TOP_LEVEL:
            return 1
        strange = [child for child in root if child.tag not in TOP_LEVEL]
        if strange and self.fault is None:
            self.fault = Fault("unsupported-stanza-type", f"an element {strange[0].tag} that is no stanza")
        for child in strange:
            if child is not last:
                root.remove(child)
        return len(root) - kept

    # -- output

    def _serialise(self, root: Element, kept: int, rest: int) -> bytes:
        if not self._plain:
            return b"".join([tostring(root[i], encoding="utf-8", with_tail=False) for i in range(kept)])
        if not rest:  # str and encode(): 1 % less of all than encoding="utf-8"
            return tostring(root, encoding="unicode")[self._start_tag : -len(self._END)].encode()
        root[kept].addprevious(etree.Comment())
        whole = tostring(root, encoding="unicode")
        root.remove(root[kept])
        return whole[self._start_tag : whole.index(self._MARK)].encode()

    def _remove_unsendable(self, kept: int, max_send: int, unsendable: Callable[[Element], None]) -> tuple[int, bytes]:
        """Remove the kept stanzas that cannot be sent as they are; return how many are left, and those mended."""
        root = self.root
        assert root is not None
        mended = b""
        for child in list(root)[:kept]:
            data = written(child)
            sendable = len(data) <= max_send and (not self._escapes or is_sound(data))
            if sendable and not self._escapes:
                continue
            if sendable:
                mended += data
            else:
                unsendable(child)
            root.remove(child)
            kept -= 1
        return kept, mended


# --------------------------------------------------------------------- the component stream (XEP-0114)


class State(Enum):
    """The states of a component's stream, in their order."""

    OPENING = "opening"  # our header is sent, the server's is awaited
    AUTHENTICATING = "authenticating"  # the handshake is sent
    READY = "ready"
    CLOSING = "closing"  # our </stream:stream> is sent
    CLOSED = "closed"


class StanzaHandler(Protocol):
    """What a ComponentStream does with stanzas; iq, message and presence say whether one is sent on."""

    def ready(self, stream: ComponentStream, now: float) -> None: ...
    def iq(self, element: Element) -> bool: ...
    def late(self, element: Element) -> bool: ...
    def message(self, element: Element) -> bool: ...
    def presence(self, element: Element) -> bool: ...
    def unsendable(self, element: Element) -> None: ...


class ComponentStream:
    """One stream to the server (XEP-0114 §3), without socket and clock: bytes in, bytes out.

    open() begins it; receive() takes what the server sent; data_to_send() is what is to go out;
    tick() and next_deadline() keep it alive. `failure` tells why it ended, if it was not for us.
    """

    # What is done with what arrives, by state. A name is a method here or, in READY, the handler's.
    _REACTIONS = {
        #                      header        handshake    error     features   iq, message, presence
        State.OPENING:        ("_challenge", "_stray",    "_error", "_ignore", ("_stray",) * 3),
        State.AUTHENTICATING: ("_nested",    "_accepted", "_error", "_ignore", ("_stray",) * 3),
        State.READY:          ("_nested",    "_ignore",   "_error", "_ignore", ("iq", "message", "presence")),
        State.CLOSING:        ("_ignore",    "_ignore",   "_error", "_ignore", ("late", "_ignore", "_ignore")),
        State.CLOSED:         ("_ignore",    "_ignore",   "_ignore", "_ignore", ("_ignore",) * 3),
    }  # fmt: skip

    def __init__(self, jid: str, secret: str, max_stanza: int, max_send: int, handler: StanzaHandler) -> None:
        self.state = State.OPENING
        self.failure: Optional[Fault] = None
        self.was_ready = False
        self.trace: Optional[Callable[[str, str], None]] = None  # trace("in" or "out", start of a stanza)
        self._jid = jid
        self._secret = secret
        self._max_send = max_send
        self._handler = handler
        self._parser = StreamParser(max_stanza)
        self._out: list[bytes] = []
        self._reactions = {state: self._bind(row) for state, row in self._REACTIONS.items()}
        self._react = self._reactions[State.OPENING]
        self._now = self._heard = self._spoke = 0.0
        self._pinged: Optional[float] = None

    def _bind(self, row: tuple[str, str, str, str, tuple[str, ...]]) -> dict[str, Callable[[Element], Optional[bool]]]:
        names = {STREAM: row[0], HANDSHAKE: row[1], STREAM_ERROR: row[2], STREAM_FEATURES: row[3]}
        names.update({tag: row[4][("iq", "message", "presence").index(name)] for tag, name in STANZAS.items()})
        return {tag: getattr(self if name[0] == "_" else self._handler, name) for tag, name in names.items()}

    @property
    def lang(self) -> Optional[str]:
        """The xml:lang of the server's header, which holds for stanzas without one (RFC 6120 §4.7.4)."""
        return self._parser.lang

    # -- what the owner of the connection calls

    def open(self, now: float) -> None:
        """Begin the stream: XEP-0114 §3, example 1."""
        self._now = self._heard = self._spoke = now
        self.send(
            f"<?xml version='1.0'?><stream:stream xmlns='{NS_COMPONENT}' xmlns:stream='{NS_STREAM}' "
            f"to={quoted(self._jid)}>".encode()
        )

    def receive(self, data: bytes, now: float) -> None:
        """Handle what the server sent: every complete stanza before a fault, then the fault."""
        parser = self._parser
        if parser.fault is not None:
            return  # it must not be fed again
        self._now = self._heard = now
        self._pinged = None
        elements = parser.feed(data)
        if self.state is State.OPENING and parser.root is not None:
            self._react[STREAM](parser.root)
        if self.trace is not None:
            self._trace_all("in", elements)
        kept = 0
        for element in elements:
            if self._react[element.tag](element):
                kept += 1
            else:
                parser.discard(element)
        if self.trace is not None and kept and parser.root is not None:
            self._trace_all("out", list(parser.root)[:kept])
        output = parser.take_output(kept, self._max_send, self._handler.unsendable)
        if output:
            self._out.insert(0, output)
        if parser.closed:
            self._ended()
        elif parser.fault is not None:
            self.fail(parser.fault)

    def data_to_send(self) -> bytes:
        """Return what is to be sent since the last call, whole stanzas, and forget it."""
        data = b"".join(self._out)
        if data:
            self._out.clear()
            self._spoke = self._now
        return data

    def close(self) -> None:
        """End the stream from our side; the server ends its own in answer (RFC 6120 §4.4)."""
        if self.state is not State.CLOSED and self.state is not State.CLOSING:
            self._enter(State.CLOSING)
            self.send(b"</stream:stream>")

    def fail(self, fault: Fault) -> None:
        """End the stream with a stream error of ours (RFC 6120 §4.9)."""
        if self.state is State.CLOSED or self.state is State.CLOSING:
            return
        self.failure = fault
        self.send(f"<stream:error><{fault.condition} xmlns='{NS_STREAM_ERRORS}'/></stream:error>".encode())
        self.close()

    def release(self) -> None:
        """Let go of the parser and its documents now, not when the garbage collector comes by."""
        self._reactions.clear()
        self._react = {}

    def next_deadline(self) -> float:
        """Return when tick() has something to do."""
        if self.state is not State.READY:
            return NEVER
        theirs = self._heard + SILENCE if self._pinged is None else self._pinged + PING_WITHIN
        return min(self._spoke + SILENCE, theirs)

    def tick(self, now: float) -> None:
        """Keep the connection from falling silent, and notice when it is dead."""
        self._now = now
        if self.state is not State.READY:
            return
        if self._pinged is not None and now >= self._pinged + PING_WITHIN:
            silent = now - self._heard
            self.fail(Fault("connection-timeout", f"the server is silent for {silent:.0f} s, also to a ping"))
        elif self._pinged is None and now >= self._heard + SILENCE:
            self._pinged = now
            attributes: dict[str, Optional[str]] = {"type": "get", "id": "alive", "from": self._jid, "to": self._jid}
            self.send(stanza("iq", attributes, "<ping xmlns='urn:xmpp:ping'/>"))
        elif now >= self._spoke + SILENCE:
            self._out.append(b" ")

    # -- reactions

    def _challenge(self, header: Element) -> None:
        digest = hashlib.sha1(((header.get("id") or "") + self._secret).encode()).hexdigest()
        self._enter(State.AUTHENTICATING)
        self._out.append(f"<handshake>{digest}</handshake>".encode())

    def _accepted(self, element: Element) -> None:
        self._enter(State.READY)
        self.was_ready = True
        self._handler.ready(self, self._now)

    def _error(self, element: Element) -> None:
        text = element.findtext(f"{{{NS_STREAM_ERRORS}}}text") or ""
        condition = condition_of(element, NS_STREAM_ERRORS) or "undefined-condition"
        if self.failure is None:
            detail = "the server ended the stream" + (f": {text[:200]}" if text else "")
            self.failure = Fault(condition, detail, of_server=True)
        self.close()

    def _nested(self, element: Element) -> None:
        self.fail(Fault("unsupported-stanza-type", "a stream within the stream"))

    def _stray(self, element: Element) -> None:
        self.fail(Fault("not-authorized", f"<{describe(element)}> came before the handshake was accepted"))

    def _ignore(self, element: Element) -> None:
        pass

    def _ended(self) -> None:
        self.close()
        self._enter(State.CLOSED)

    def _enter(self, state: State) -> None:
        self.state = state
        self._react = self._reactions[state]

    def send(self, data: bytes) -> None:
        """Put a stanza, or more, behind what is to be sent."""
        self._out.append(data)
        if self.trace is not None:
            self.trace("out", data[1:].partition(b">")[0].decode())

    def _trace_all(self, direction: str, elements: Iterable[Element]) -> None:
        if self.trace is not None:
            for element in elements:
                self.trace(direction, describe(element))


def unsent_answers(data: bytes, sent: int) -> list[bytes]:
    """Return the answers and messages in data, whole stanzas, of which the first `sent` bytes are gone.

    They are what a lost connection leaves behind that nobody else answers for.
    """
    parser: Any = etree.XMLPullParser(("end",), tag=tuple(STANZAS), huge_tree=True, encoding="utf-8")
    parser.feed(f"<stream:stream xmlns='{NS_COMPONENT}' xmlns:stream='{NS_STREAM}'>".encode() + data[:sent])
    for _ in parser.read_events():
        pass  # gone
    if sent < len(data):
        parser.feed(data[sent:])
    elements = [element for _, element in parser.read_events() if element.getparent().getparent() is None]
    wanted = [e for e in elements if e.get("type") in ("result", "error") or STANZAS[e.tag] == "message"]
    return [written(element) for element in wanted]


# ---------------------------------------------------------------------- the resources and who serves


class Resource:
    """An available resource of the target."""

    __slots__ = ("jid", "open", "pool", "index", "heard", "timeouts")

    def __init__(self, jid: str, now: float) -> None:
        self.jid = jid  # full JID
        self.open: set[tuple[str, str]] = set()  # the keys of its open requests
        self.pool: Optional[list[Resource]] = None  # where it stands in the roster, None: gone
        self.index = 0  # its place there
        self.heard = now  # when something came from it that the server did not write in its name
        self.timeouts = 0  # in a row


class Policy:
    """Chooses one of the resources, of which there is at least one, for a requester. This one: any, at random."""

    def __init__(self, rand: Callable[[], float]) -> None:
        self._random = rand

    def choose(self, roster: Roster, requester: str) -> Resource:
        """requester: full JID."""
        pool = roster.trusted or roster.suspects
        return pool[int(self._random() * len(pool))]


class RoundRobinPolicy(Policy):
    """One resource after the other."""

    _turn = 0

    def choose(self, roster: Roster, requester: str) -> Resource:
        pool = roster.trusted or roster.suspects
        self._turn += 1
        return pool[self._turn % len(pool)]


class LeastOutstandingPolicy(Policy):
    """A resource with the fewest open requests; of several, any."""

    def choose(self, roster: Roster, requester: str) -> Resource:
        pool = roster.trusted or roster.suspects
        fewest = min([len(resource.open) for resource in pool])
        pool = [resource for resource in pool if len(resource.open) == fewest]
        return pool[int(self._random() * len(pool))]


class StickyPolicy(Policy):
    """The resource that the same requester had before, while it lives (multi-step commands, XEP-0050)."""

    def __init__(self, rand: Callable[[], float]) -> None:
        super().__init__(rand)
        self._table: collections.OrderedDict[str, str] = collections.OrderedDict()  # requester -> full JID

    def choose(self, roster: Roster, requester: str) -> Resource:
        resource = roster.resources.get(self._table.get(requester, ""))
        if resource is None or resource.pool is not (roster.trusted or roster.suspects):
            resource = super().choose(roster, requester)
            self._table[requester] = resource.jid
            if len(self._table) > MAX_STICKY:
                self._table.popitem(last=False)
        self._table.move_to_end(requester)
        return resource


POLICIES: dict[str, type[Policy]] = {
    "random": Policy,
    "round-robin": RoundRobinPolicy,
    "least-outstanding": LeastOutstandingPolicy,
    "sticky": StickyPolicy,
}


class Roster:
    """The available resources of the target: by full JID, and in two lists to choose from at once."""

    def __init__(self) -> None:
        self.resources: dict[str, Resource] = {}
        self.trusted: list[Resource] = []
        self.suspects: list[Resource] = []  # chosen only when there is no other

    def add(self, jid: str, now: float) -> Resource:
        resource = self.resources[jid] = Resource(jid, now)
        self._put(resource, self.trusted)
        return resource

    def remove(self, jid: str) -> Optional[Resource]:
        resource = self.resources.pop(jid, None)
        if resource is not None:
            self._take(resource)
        return resource

    def trust(self, resource: Resource) -> None:
        """Something has come from the resource."""
        resource.timeouts = 0
        if resource.pool is self.suspects:
            self._take(resource)
            self._put(resource, self.trusted)

    def timed_out(self, resource: Resource) -> bool:
        """Count a timeout; return whether the resource has now become a suspect."""
        resource.timeouts += 1
        if resource.timeouts < TIMEOUTS_SUSPECT or resource.pool is not self.trusted:
            return False
        self._take(resource)
        self._put(resource, self.suspects)
        return True

    @staticmethod
    def _put(resource: Resource, pool: list[Resource]) -> None:
        resource.pool, resource.index = pool, len(pool)
        pool.append(resource)

    @staticmethod
    def _take(resource: Resource) -> None:
        pool = resource.pool
        assert pool is not None
        last = pool.pop()
        if last is not resource:  # the last one fills its place
            pool[resource.index], last.index = last, resource.index
        resource.pool = None


# ---------------------------------------------------------------------------------- the JAT tables


class Codec:
    """Requesters' JIDs to addresses of the component and back: component/encoded-from.

    With `jid` the resource is the requester's JID itself. With `opaque`, and for a JID that is too
    long, it is a token: a keyed hash, so that it is stable, tells nothing and cannot be guessed.
    Answers need no decoding, their request is open. For relayed stanzas there is a table of tokens,
    the least recently used go first, but not those of users for whom busy(JID) holds.
    """

    def __init__(self, component: str, secret: str, opaque: bool, busy: Optional[Callable[[str], bool]]) -> None:
        """busy: None where nothing is relayed; then no table is kept."""
        self._prefix = component + "/"
        self._opaque = opaque
        self._key = hashlib.blake2b(f"clientproxy\0{component}\0{secret}".encode()).digest()
        self._busy = busy
        self._users: collections.OrderedDict[str, str] = collections.OrderedDict()

    def encode(self, jid: str) -> str:
        """Return the address that stands for a requester towards the implementing client."""
        if self._opaque or len(jid) > MAX_RESOURCE // 4 and len(jid.encode()) > MAX_RESOURCE:
            return self._token(jid)
        return self._prefix + jid

    def decode(self, address: str) -> Optional[str]:
        """Return the requester's JID, or None where the address stands for nobody."""
        encoded = address[len(self._prefix) :] if address.startswith(self._prefix) else ""
        if encoded.startswith(".") and "@" not in encoded:
            if address in self._users:
                self._users.move_to_end(address)
            return self._users.get(address)
        return encoded if not self._opaque and encoded and is_jid(encoded) else None

    def _token(self, jid: str) -> str:
        digest = hashlib.blake2b(jid.encode(), key=self._key, digest_size=20).hexdigest()
        address = f"{self._prefix}.{digest}"
        if self._busy is not None:
            self._users[address] = jid
            self._users.move_to_end(address)
            self._forget_some(self._busy)
        return address

    def _forget_some(self, busy: Callable[[str], bool]) -> None:
        for _ in range(2):  # one has come; one that stays for its open request must not make the table grow
            if len(self._users) > MAX_TOKENS:
                address, jid = self._users.popitem(last=False)
                if busy(jid):
                    self._users[address] = jid


class Request:
    """An open request, of a user to the target or of the target to a user. (Slots are faster than a NamedTuple.)"""

    __slots__ = ("requester", "asked", "answerer", "id", "user", "started", "resource")

    def __init__(
        self, requester: str, asked: str, answerer: str, id_: str, user: str, started: float,
        resource: Optional[Resource],
    ) -> None:  # fmt: skip
        self.requester = requester  # JID that asked and is answered
        self.asked = asked  # address that was asked and answers
        self.answerer = answerer  # full JID whose answer counts, nobody else's
        self.id = id_  # the requester's
        self.user = user  # bare JID that it counts for
        self.started = started
        self.resource = resource  # that was asked, None: it is the target that asks


RequestKey = tuple[str, str]  # where the answer will be addressed to, and its id


class OpenRequests:
    """The open requests, oldest first, with the bounds on them."""

    def __init__(self, timeout: float, max_pending: int, max_per_user: int) -> None:
        self._timeout = timeout
        self._max_pending = max_pending
        self._max_per_user = max_per_user
        self._table: dict[RequestKey, Request] = {}
        self._users: dict[str, int] = {}  # bare JID -> how many
        self._of_target: set[tuple[str, str, str]] = set()  # requester, asked, id
        self._long_ids = 0  # characters
        self.check_at = 0.0  # no deadline passes before; so none needs looking at for each request

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._table

    def has_user(self, jid: str) -> bool:
        """Whether a user, by his full or bare JID, has a request open."""
        return jid.partition("/")[0] in self._users

    def add(self, key: RequestKey, request: Request) -> str:
        """Enter a request, unless it must be refused: return the error condition, or ''."""
        if key in self._table:
            return "conflict"
        count = self._users.get(request.user, 0)
        if len(self._table) >= self._max_pending or count >= self._max_per_user:
            return "resource-constraint"
        if len(request.id) > LONG_ID or request.resource is None:
            refusal = self._add_unusual(request)
            if refusal:
                return refusal
        self._table[key] = request
        self._users[request.user] = count + 1
        if request.resource is not None:
            request.resource.open.add(key)
        return ""

    def answer(self, key: RequestKey, sender: Optional[str]) -> Optional[Request]:
        """Take out the request that an answer of `sender` belongs to; None: it was not asked."""
        request = self._table.get(key)
        if request is None or request.answerer != sender:
            return None
        self._close(key, request)
        return request

    def take(self, keys: Iterable[RequestKey]) -> list[Request]:
        """Take out these requests."""
        taken = [(key, self._table[key]) for key in keys]
        for key, request in taken:
            self._close(key, request)
        return [request for _, request in taken]

    def take_all(self) -> list[Request]:
        return self.take(list(self._table))

    def take_overdue(self, now: float) -> list[Request]:
        """Take out the requests whose time has passed; they are the oldest, so only those are looked at."""
        overdue: list[RequestKey] = []
        self.check_at = now + max(self._timeout, 0.01)
        for key, request in self._table.items():
            if request.started + self._timeout > now or len(overdue) == TIMEOUTS_AT_ONCE:
                self.check_at = request.started + self._timeout
                break
            overdue.append(key)
        return self.take(overdue)

    def _add_unusual(self, request: Request) -> str:
        if len(request.id) > LONG_ID and self._long_ids + len(request.id) > MAX_LONG_IDS:
            return "resource-constraint"
        if request.resource is None:
            if (request.requester, request.asked, request.id) in self._of_target:
                return "conflict"
            self._of_target.add((request.requester, request.asked, request.id))
        if len(request.id) > LONG_ID:
            self._long_ids += len(request.id)
        return ""

    def _close(self, key: RequestKey, request: Request) -> None:
        del self._table[key]
        user = request.user
        count = self._users[user]
        if count > 1:
            self._users[user] = count - 1
        else:
            del self._users[user]
        if request.resource is not None:
            request.resource.open.discard(key)
        else:
            self._of_target.discard((request.requester, request.asked, request.id))
        if len(request.id) > LONG_ID:
            self._long_ids -= len(request.id)


# -------------------------------------------------------------------------------- the proxy's rules


class Component(NamedTuple):
    """The configuration of one component; the keys are explained in COMPONENT_KEYS."""

    jid: str
    target_address: str
    server: Server
    tls: bool
    tls_ca: str  # the certificates themselves, PEM; '': the system's
    secret: str
    encoding: str
    timeout: float
    max_pending: int
    max_pending_per_user: int
    max_stanza: int
    max_send: int
    policy: str
    resources: str
    allow: tuple[str, ...]
    relay: frozenset[str]


class Server(NamedTuple):
    """Where a server listens: host and port, or a unix socket (port 0, the path as host)."""

    host: str
    port: int

    def __str__(self) -> str:
        if not self.port:
            return f"unix:{self.host}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Doubt:
    """A probe under way because resources answered service-unavailable."""

    def __init__(self, since: float, resource: str) -> None:
        self.since = since
        self.resources = {resource}  # full JIDs
        self.answered = False  # the server has named others


class Contact:
    """What is known of the target on one stream, and learnt anew on the next."""

    def __init__(self, ready_at: float = NEVER) -> None:
        self.ready_at = ready_at  # NEVER: there is no stream
        self.known_once = False  # a resource has been known
        self.subscribed = False
        self.ask_at = NEVER
        self.ask_pause = 1.0  # s
        self.doubt: Optional[Doubt] = None
        self.doubt_at = 0.0  # before that there is no other
        self.told = ""  # the state that the log knows
        self.told_full = False


def allow_function(globs: tuple[str, ...]) -> Optional[Callable[[str], bool]]:
    """Return a function that says whether a full JID may ask, None for everyone.

    A glob with `/` is matched against the full JID, one with `@` against the bare JID, any other
    against the domain; `*` and `?` match neither `@` nor `/`, as a requester chooses his resource.
    """
    if "*" in globs:
        return None
    patterns = [(0 if "/" in glob else 1 if "@" in glob else 2, glob_pattern(glob)) for glob in globs]

    def allowed(jid: str) -> bool:
        user = jid.partition("/")[0]
        subjects = (jid, user, split_jid(user)[1])
        return any(pattern.fullmatch(subjects[subject]) for subject, pattern in patterns)

    return allowed


def glob_pattern(glob: str) -> re.Pattern[str]:
    """Return a glob of JIDs as a pattern that never goes back behind a `*`: requesters choose what it meets."""
    first, *rest = (re.escape(part).replace(r"\?", "[^@/]") for part in glob.split("*"))
    for number, part in enumerate(rest[:-1]):
        first += f"(?=(?P<part{number}>[^@/]*?{part}))(?P=part{number})"
    return re.compile(first + "".join(f"[^@/]*{part}" for part in rest[-1:]), re.DOTALL)


class Proxy:
    """One component's rules: what is done with each stanza that comes in.

    It outlives its streams: ready() hands it a new one, lost() takes it away. The handlers iq(),
    message() and presence() return True for a stanza that they have rewritten and that is to be
    sent on, False for one that ends here. `now` must be set before they are called.
    """

    def __init__(self, component: Component, domains: set[str], rand: Callable[[], float], say: Say) -> None:
        """domains: those of all components of this daemon, which must not ask one another."""
        self.now = 0.0
        self.draining = False
        self.jid = component.jid
        self.target = component.target_address
        self.relay = component.relay
        self.roster = Roster()
        self.requests = OpenRequests(component.timeout, component.max_pending, component.max_pending_per_user)
        busy = self.requests.has_user if component.relay else None
        self.codec = Codec(component.jid, component.secret, component.encoding == "opaque", busy)
        self.outcomes: collections.Counter[tuple[str, str]] = collections.Counter()  # (stanza, outcome)
        self.dropped: collections.Counter[str] = collections.Counter()  # reason
        self.answer_counts = [0] * (len(ANSWER_SECONDS) + 1)
        self.answer_seconds = 0.0
        self._max_send = component.max_send
        self._domains = domains
        self._say = say
        self._send: Callable[[bytes], None] = lambda data: None
        self._lang: Optional[str] = None
        self._allowed = allow_function(component.allow)
        self._choose = POLICIES[component.policy](rand).choose
        self._serves = re.compile(fnmatch.translate(component.resources)).match if component.resources != "*" else None
        self._salt = f"{int(rand() * 2**53):x}"
        self._asked = 0  # requests of the target that were sent on
        self._orphans: list[tuple[float, Request]] = []  # of lost connections, to be answered on the next
        self._max_orphans = component.max_pending
        self._unsent: list[tuple[float, bytes]] = []
        self._drops_logged: dict[str, float] = {}
        self._contact = Contact()

    # -- the stream comes and goes

    def ready(self, stream: ComponentStream, now: float) -> None:
        """The handshake was accepted: answer what the last connection left, ask for presence."""
        self.now = now
        self._contact = Contact(now)
        self._send = stream.send
        self._lang = stream.lang
        self.settle_orphans(now)
        for _, data in self._unsent:
            self._send(data)
        for _, request in self._orphans:
            self._answer_error(request, "recipient-unavailable")
        self._unsent, self._orphans = [], []
        self._ask()

    def lost(self, now: float, unsent: list[bytes]) -> None:
        """The stream has ended; unsent: answers that could not be written any more."""
        self._orphans += [(now, request) for request in self.requests.take_all()]
        self._unsent += [(now, data) for data in unsent]
        self._send = lambda data: None
        self.roster = Roster()
        self._contact = Contact()

    def inherit(self, other: Proxy) -> None:
        """Take over what another proxy of the same component could not answer."""
        self._orphans, self._unsent, self.draining = other._orphans, other._unsent, other.draining

    def owed(self) -> int:
        """Return how many requesters are still to be answered."""
        return len(self.requests) + len(self._orphans) + len(self._unsent)

    def settle_orphans(self, now: float) -> None:
        """Give up what has waited too long for a connection; its requesters have long given up."""
        before = len(self._orphans) + len(self._unsent)
        self._orphans = [orphan for orphan in self._orphans if now - orphan[0] <= ORPHANS_KEPT]
        self._unsent = [answer for answer in self._unsent if now - answer[0] <= ORPHANS_KEPT]
        gone = before - len(self._orphans) - len(self._unsent)
        if gone:
            self.outcomes["iq", "abandoned"] += gone
            self._say(logging.WARNING, "%d requests stay unanswered: the server was away for %d s", gone, ORPHANS_KEPT)

    def answer_all(self, condition: str) -> None:
        """Answer every open request with an error."""
        for request in self.requests.take_all():
            self._answer_error(request, condition)

    # -- IQ: the hot path, a request and its answer

    def iq(self, iq: Element) -> bool:
        attributes: Attributes = iq.attrib  # faster than get() and set(): 4 % of all
        try:
            kind, sender, to, id_ = attributes[b"type"], attributes[b"from"], attributes[b"to"], attributes[b"id"]
        except KeyError:
            return self._incomplete(iq)
        if kind == "get" or kind == "set":
            return self._request(iq, attributes, sender, to, id_)
        if kind == "result" or kind == "error":
            return self._answer(iq, attributes, kind, sender, (to, id_))
        return self._incomplete(iq)

    def _request(self, iq: Element, attributes: Attributes, sender: str, to: str, id_: str) -> bool:
        if not sender or to != self.jid and not self._is_mine(to):
            return self._drop(iq)
        user = sender.partition("/")[0]
        if user == self.target:
            return self._request_of_target(iq, sender)
        if user.rpartition("@")[2] in self._domains:
            return self._request_of_component(iq, user)
        if self.draining:
            return self._refuse(iq, "recipient-unavailable")
        if self._allowed is not None and not self._allowed(sender):
            return self._refuse(iq, "forbidden")
        if not id_ or len(iq) != 1:  # RFC 6120 §8.2.3
            return self._refuse(iq, "bad-request")
        roster = self.roster
        if not roster.resources:
            return self._refuse(iq, self._no_resource())
        resource = self._choose(roster, sender)
        encoded = self.codec.encode(sender)
        request = Request(sender, to, resource.jid, id_, user, self.now, resource)
        refusal = self.requests.add((encoded, id_), request)
        if refusal:
            return self._refuse(iq, refusal)
        return self._forward(attributes, resource.jid, encoded)

    def _answer(self, iq: Element, attributes: Attributes, kind: str, sender: str, key: RequestKey) -> bool:
        request = self.requests.answer(key, sender)
        if request is None:
            return self._stray_answer(iq)
        resource = request.resource
        if resource is None:
            attributes[b"id"] = request.id
        elif kind == "error" and error_condition(iq) == "service-unavailable":
            self._doubt_resource(resource)
        else:
            resource.heard = self.now
        if resource is not None and resource.timeouts:
            self.roster.trust(resource)
        seconds = self.now - request.started
        self.answer_seconds += seconds
        self.answer_counts[bisect_left(ANSWER_SECONDS, seconds)] += 1
        return self._forward(attributes, request.requester, request.asked)

    def _forward(self, attributes: Attributes, to: str, from_: str) -> bool:
        """Rewrite a stanza where it stands, to be sent on."""
        attributes[b"from"] = from_
        attributes[b"to"] = to
        if self._lang is not None and XML_LANG not in attributes:
            attributes[XML_LANG] = self._lang
        return True

    # -- IQ: everything else

    def late(self, iq: Element) -> bool:
        """A request that comes when our end of the stream is sent already is answered on the next one."""
        sender, to, id_ = iq.get("from"), iq.get("to"), iq.get("id")
        if iq.get("type") in ("get", "set") and sender and to and id_ and len(self._orphans) < self._max_orphans:
            self._orphans.append((self.now, Request(sender, to, "", id_, "", self.now, None)))
        return False

    def _incomplete(self, iq: Element) -> bool:
        """An IQ of no or an unknown type, or without id, from or to (RFC 6120 §8.1, §8.2.3)."""
        if iq.get("type") in ("result", "error"):
            return self._stray_answer(iq)
        return bool(self._origin(iq)) and self._refuse(iq, "bad-request")

    def _no_resource(self) -> str:
        contact = self._contact
        early = not contact.known_once and self.now < contact.ready_at + GRACE
        return "recipient-unavailable" if early else "service-unavailable"

    def _request_of_component(self, iq: Element, user: str) -> bool:
        """Our own ping that has come back is a sign of life; what another component of ours asks, a loop."""
        return user != self.jid and self._refuse(iq, "not-allowed")

    def _request_of_target(self, iq: Element, sender: str) -> bool:
        """With relay = iq a serving resource may ask the user that component/encoded-from stands for."""
        self._sign_of_life(iq)
        to = iq.get("to") or ""
        if "iq" not in self.relay or not to.startswith(self.jid + "/") or sender not in self.roster.resources:
            return self._refuse(iq, "not-allowed")
        if self.draining:
            return self._refuse(iq, "recipient-unavailable")
        user, id_ = self._decode(to), iq.get("id")
        if user is None:
            return self._refuse(iq, "item-not-found")
        if not id_ or len(iq) != 1:
            return self._refuse(iq, "bad-request")
        self._asked += 1
        fresh = f"{self._salt}-{self._asked}"
        request = Request(sender, to, user, id_, self.target, self.now, None)
        refusal = self.requests.add((self.jid, fresh), request)
        if refusal:
            return self._refuse(iq, refusal)
        iq.set("id", fresh)
        return self._forward(iq.attrib, user, self.jid)

    def _stray_answer(self, iq: Element) -> bool:
        if self._is_own(iq):
            return False
        self._sign_of_life(iq)
        asked = (iq.get("to") or "", iq.get("id") or "") in self.requests
        return self._drop(iq, "answer from another" if asked else "answer to nothing")

    def _decode(self, address: str) -> Optional[str]:
        user = self.codec.decode(address)
        return None if user is None or split_jid(user)[1] in self._domains else user

    def unsendable(self, element: Element) -> None:
        """A rewritten IQ is over max_send, or cannot be written: whoever asked gets to know instead."""
        to, from_, id_ = element.get("to") or "", element.get("from") or "", element.get("id") or ""
        if element.get("type") in ("result", "error"):  # an answer, addressed already
            self._error("iq", "policy-violation", to, from_, id_)
        else:
            request = self.requests.answer((from_, id_), to)
            if request is not None:
                self._answer_error(request, "policy-violation")

    # -- messages

    def message(self, message: Element) -> bool:
        origin, error = self._origin(message), message.get("type") == "error"
        if not origin:
            return False
        if "message" not in self.relay:
            return not error and self._refuse(message, "feature-not-implemented")
        if origin == "component":
            return not error and self._refuse(message, "not-allowed")
        return self._message_of_user(message, error) if origin == "user" else self._message_of_target(message, error)

    def _message_of_user(self, message: Element, error: bool) -> bool:
        sender = message.get("from") or ""
        if self._allowed is not None and not self._allowed(sender):
            return not error and self._refuse(message, "forbidden")
        known = self.roster.resources
        if not known or self.draining:
            silent = message.get("type") in ("error", "headline", "groupchat")  # RFC 6121 §8.5.2
            return not silent and self._refuse(message, "recipient-unavailable" if known else "service-unavailable")
        return self._relay(message, self._choose(self.roster, sender).jid, self.codec.encode(sender))

    def _message_of_target(self, message: Element, error: bool) -> bool:
        to = message.get("to") or ""
        if to == self.jid:
            return not error and self._refuse(message, "feature-not-implemented")
        user = self._decode(to)
        if user is None:
            return not error and self._refuse(message, "item-not-found")
        return self._relay(message, user, self.jid)

    def _relay(self, element: Element, to: str, from_: str) -> bool:
        kind, sender, asked = STANZAS[element.tag], element.get("from") or "", element.get("to") or ""
        self._forward(element.attrib, to, from_)
        if len(tostring(element, encoding="utf-8", with_tail=False)) <= self._max_send:  # unsendable() knows IQs only
            self.outcomes[kind, "relayed"] += 1
            return True
        if kind == "message" and element.get("type") != "error":
            self._error(kind, "policy-violation", sender, asked, element.get("id"))
        return False

    # -- presence

    def presence(self, presence: Element) -> bool:
        origin = self._origin(presence)
        if not origin:
            return False
        kind = presence.get("type") or "available"
        if origin == "target":
            react = self._PRESENCE_OF_TARGET.get(kind)
            return react is not None and react(self, presence, presence.get("from") or "")
        return origin == "user" and self._presence_of_user(presence, kind)

    def _presence_of_user(self, presence: Element, kind: str) -> bool:
        sender, to = presence.get("from") or "", presence.get("to") or ""
        if kind == "subscribe":
            self._send(stanza("presence", {"type": "unsubscribed", "from": to, "to": sender}))
            return False
        if "presence" not in self.relay or kind not in ("available", "unavailable"):
            return False
        if not self.roster.resources or self.draining or self._allowed is not None and not self._allowed(sender):
            return False
        return self._relay(presence, self._choose(self.roster, sender).jid, self.codec.encode(sender))

    def _directed(self, presence: Element) -> bool:
        """Presence of the target to component/encoded-from, which says nothing about its resources."""
        user = self._decode(presence.get("to") or "") if "presence" in self.relay else None
        return user is not None and self._relay(presence, user, self.jid)

    def _available(self, presence: Element, sender: str) -> bool:
        if presence.get("to") != self.jid and split_jid(presence.get("to") or "")[2]:
            return self._directed(presence)
        name = split_jid(sender)[2]
        if not name:
            return False
        resource = self.roster.resources.get(sender)
        doubt = self._contact.doubt
        if doubt is not None and sender not in doubt.resources:
            doubt.answered = True
        if resource is None and (self._serves is None or self._serves(name)):
            self._resource_comes(sender)
        return False

    def _resource_comes(self, jid: str) -> None:
        if len(self.roster.resources) >= MAX_RESOURCES:
            if not self._contact.told_full:
                self._contact.told_full = True
                self._say(logging.WARNING, "over %d resources of %s: others do not serve", MAX_RESOURCES, self.target)
            return
        self.roster.add(jid, self.now)
        self._contact.known_once = True
        self._contact.ask_at = NEVER
        self._tell_resources(f"{jid} has come")

    def _unavailable(self, presence: Element, sender: str) -> bool:
        if presence.get("to") != self.jid and split_jid(presence.get("to") or "")[2]:
            return self._directed(presence)
        if "/" in sender:
            self._forget(sender, "has gone")
        else:  # an acknowledgement of servers for an account without a resource online
            self._forget_all()
            if self._contact.told != "not subscribed":
                self._tell("offline", logging.WARNING, "%s is offline: log the implementing client in", self.target)
        return False

    def _subscribed_by(self, presence: Element, sender: str) -> bool:
        if not self._contact.subscribed:  # some servers then send one resource only; the probe brings all
            self._contact.subscribed = True
            self._tell("subscribed", logging.INFO, "%s has accepted our subscription", self.target)
            self._send(stanza("presence", {"type": "probe", "from": self.jid, "to": self.target}))
        return False

    def _unsubscribed(self, presence: Element, sender: str) -> bool:
        self._contact.subscribed = False
        self._forget_all()
        self._tell(
            "not subscribed", logging.WARNING,
            "not subscribed to %s: let the implementing client accept the subscription request of %s",
            self.target, self.jid,
        )  # fmt: skip
        return False

    def _subscribe(self, presence: Element, sender: str) -> bool:
        to = sender.partition("/")[0]
        self._send(stanza("presence", {"type": "subscribed", "from": self.jid, "to": to}))
        return self._probe(presence, to)

    def _probe(self, presence: Element, sender: str) -> bool:
        self._send(stanza("presence", {"from": self.jid, "to": sender}))
        return False

    def _unsubscribe(self, presence: Element, sender: str) -> bool:
        self._say(logging.INFO, "%s no longer wants our presence; its own still reaches us", self.target)
        return False

    def _presence_error(self, presence: Element, sender: str) -> bool:
        condition = error_condition(presence) or "an error without condition"
        self._tell(condition, logging.WARNING, "presence to %s came back: %s; is target_address right, and its server "
                   "reachable?", sender, condition)  # fmt: skip
        if "/" in sender:
            self._forget(sender, f"answers {condition}")
        return False

    _PRESENCE_OF_TARGET = {
        "available": _available,
        "unavailable": _unavailable,
        "subscribe": _subscribe,
        "subscribed": _subscribed_by,
        "unsubscribe": _unsubscribe,
        "unsubscribed": _unsubscribed,
        "probe": _probe,
        "error": _presence_error,
    }

    # -- resources go

    def _forget(self, jid: str, why: str, tell: bool = True) -> None:
        """A resource is gone: whoever waits for it is told at once."""
        resource = self.roster.remove(jid)
        if resource is None:
            return
        for request in self.requests.take(list(resource.open)):
            self._answer_error(request, "recipient-unavailable")
        if not self.roster.resources:
            self._contact.ask_at, self._contact.ask_pause = self.now + 1.0, 2.0
        if tell:
            self._tell_resources(f"{jid} {why}")

    def _forget_all(self) -> None:
        for jid in list(self.roster.resources):
            self._forget(jid, "has gone", tell=False)

    def _doubt_resource(self, resource: Resource) -> None:
        """service-unavailable may be the client's answer, or the server's for a client that it lost."""
        contact = self._contact
        if contact.doubt is not None:
            contact.doubt.resources.add(resource.jid)
        elif self.now >= contact.doubt_at:
            contact.doubt_at = self.now + DOUBT_EVERY
            contact.doubt = Doubt(self.now, resource.jid)
            self._send(stanza("presence", {"type": "probe", "from": self.jid, "to": self.target}))

    def _end_doubt(self, doubt: Doubt) -> None:
        self._contact.doubt = None
        if doubt.answered:
            for jid in doubt.resources:
                resource = self.roster.resources.get(jid)
                if resource is not None and resource.heard <= doubt.since:
                    self._forget(jid, "answers service-unavailable and is not among what the server knows")

    # -- time

    def next_deadline(self) -> float:
        """Return when tick() has something to do."""
        contact = self._contact
        if contact.ready_at == NEVER:
            return min([since for since, _ in self._orphans[:1] + self._unsent[:1]], default=NEVER) + ORPHANS_KEPT + 1.0
        doubt = contact.doubt.since + DOUBT_FOR if contact.doubt is not None else NEVER
        told = NEVER if contact.told else contact.ready_at + GRACE
        return min(contact.ask_at, self.requests.check_at, doubt, told)

    def tick(self, now: float) -> None:
        """Do what is due; everything that has arrived has been handled before."""
        self.now = now
        contact = self._contact
        if contact.ready_at == NEVER:
            self.settle_orphans(now)
            return
        if now >= contact.ask_at:
            self._ask()
        if now >= self.requests.check_at:
            for request in self.requests.take_overdue(now):
                self._timed_out(request)
        if contact.doubt is not None and now >= contact.doubt.since + DOUBT_FOR:
            self._end_doubt(contact.doubt)
        if not contact.told and now >= contact.ready_at + GRACE:
            self._tell(
                "silent", logging.WARNING,
                "no resource of %s is known: log the client in, let it accept the subscription request of %s",
                self.target, self.jid,
            )  # fmt: skip

    def _ask(self) -> None:
        """Nothing but a subscribe and a probe makes every server send presence to a component.

        In this order: Prosody answers the probe of somebody not subscribed by forgetting what he has asked for,
        and the client could accept a request that came before it without anybody being told.
        """
        for kind in ("probe", "subscribe"):
            self._send(stanza("presence", {"type": kind, "from": self.jid, "to": self.target}))
        contact = self._contact
        contact.ask_at = self.now + contact.ask_pause
        contact.ask_pause = min(2 * contact.ask_pause, ASK_AGAIN_MAX)

    def _timed_out(self, request: Request) -> None:
        self._answer_error(request, "remote-server-timeout")
        if request.resource is not None and self.roster.timed_out(request.resource):
            self._say(logging.WARNING, "%s has left %d requests in a row unanswered: it gets others only when nobody "
                      "else can serve them", request.answerer, TIMEOUTS_SUSPECT)  # fmt: skip

    # -- helpers

    def _is_mine(self, to: Optional[str]) -> bool:
        return bool(to) and split_jid(to or "")[1].lower() == self.jid

    def _origin(self, element: Element) -> str:
        """Return who sent a stanza: 'user', 'target', 'component' (of this daemon), or '': it ends here."""
        user = (element.get("from") or "").partition("/")[0]
        if self._is_own(element):
            return ""
        if not user or not self._is_mine(element.get("to")):
            self._drop(element)
            return ""
        if user == self.target:
            self._sign_of_life(element)
            return "target"
        return "component" if user.rpartition("@")[2] in self._domains else "user"

    def _sign_of_life(self, element: Element) -> None:
        """Something that is no answer has come from the target, perhaps from a resource that was given up."""
        resource = self.roster.resources.get(element.get("from") or "")
        if resource is not None:
            self.roster.trust(resource)
            if element.get("type") != "error":  # that one may be the server's, in its name
                resource.heard = self.now

    def _is_own(self, element: Element) -> bool:
        """Whether a stanza is one of ours that has come back; some servers bounce without swapping addresses."""
        if split_jid(element.get("from") or "")[1] != self.jid:
            return False
        if element.get("type") == "error" and element.get("id") != "alive":
            self.dropped["own stanza bounced"] += 1
        return True

    def _drop(self, element: Element, reason: str = "") -> bool:
        """Count a stanza that gets no answer, and log it at most once a minute for each reason."""
        reason = reason or ("not addressed to the component" if element.get("from") else "without from")
        self._count_drop(reason, describe(element)[:400])
        return False

    def _count_drop(self, reason: str, what: str) -> None:
        self.dropped[reason] += 1
        if self.now >= self._drops_logged.get(reason, -NEVER) + LOG_DROPS_EVERY:
            self._drops_logged[reason] = self.now
            self._say(logging.WARNING, "dropped: %s: %s (%d so far)", reason, what, self.dropped[reason])

    def _refuse(self, element: Element, condition: str) -> bool:
        get = element.get
        self._error(STANZAS[element.tag], condition, get("from") or "", get("to") or "", get("id"))
        return False

    def _answer_error(self, request: Request, condition: str) -> None:
        self._error("iq", condition, request.requester, request.asked, request.id)

    def _error(self, name: str, condition: str, to: str, from_: str, id_: Optional[str]) -> None:
        self.outcomes[name, condition] += 1
        data = error_stanza(name, condition, to, from_, id_)
        if len(data) <= self._max_send:
            self._send(data)
        else:
            self._count_drop("an error with so long an id would be over max_send", f"to {to[:200]!r}")

    def _tell(self, state: str, level: int, template: str, *arguments: object) -> None:
        """Log a state of the target once, when it begins."""
        if state != self._contact.told:
            self._contact.told = state
            self._say(level, template, *arguments)

    def _tell_resources(self, event: str) -> None:
        count = len(self.roster.resources)
        if count:
            self._tell(f"{count}", logging.INFO, "%s: resources of %s that serve: %d", event, self.target, count)
        else:
            self._tell("offline", logging.WARNING, "%s: no resource of %s is left, log one in", event, self.target)


# ----------------------------------------------------------------------------------- configuration


class ConfigurationError(Exception):
    """The configuration is wrong; each argument is one mistake, a line for the operator."""


class Key(NamedTuple):
    """A key of the configuration file. convert() raises ValueError with what would be right."""

    name: str
    convert: Callable[[str], Any]
    default: Optional[str]  # as it would be written; None: required
    help: str


def whole_number(at_least: int = 1) -> Callable[[str], int]:
    """Return a converter for a number that counts something."""

    def convert(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or int(text) < at_least:
            raise ValueError(f"{text!r} is not a whole number of at least {at_least}")
        return int(text)

    return convert


def seconds(zero: bool = False) -> Callable[[str], float]:
    """Return a converter for a time, with fractions, of at most a day."""

    def convert(text: str) -> float:
        number = float(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) else NEVER
        if number > 86400 or not number and not zero:
            raise ValueError(f"{text!r} is not a number of seconds {'from 0' if zero else 'above 0'} to 86400")
        return number

    return convert


def word(*words: str) -> Callable[[str], str]:
    """Return a converter for one of some words."""

    def convert(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"{text!r} is none of {', '.join(words)}")
        return text.lower()

    return convert


def words(*allowed: str) -> Callable[[str], frozenset[str]]:
    """Return a converter for any number of some words, separated by spaces."""

    def convert(text: str) -> frozenset[str]:
        given = text.lower().split()
        strange = [name for name in given if name not in allowed]
        if strange:
            raise ValueError(f"{', '.join(map(repr, strange))} is none of {', '.join(allowed)}")
        return frozenset(given)

    return convert


def bare_jid(text: str) -> str:
    """Convert the address of an account."""
    local, _, resource = split_jid(text)
    if not is_jid(text) or not local or resource:
        raise ValueError(f"{text!r} is not a bare JID such as some-user@some-domain.example")
    return text.lower()


def address(text: str) -> Server:
    """Convert host:port, [v6]:port or unix:/path."""
    if text.startswith("unix:"):
        if not text[5:] or len(text[5:].encode()) > 107:
            raise ValueError(f"{text!r} is not unix: and a path of at most 107 bytes")
        return Server(text[5:], 0)
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    good = ipv6(host[1:-1]) if bracketed else _DOMAIN.fullmatch(host)
    if not good or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not host:port, [v6]:port or unix:/path, with a port from 1 to 65535")
    return Server(host[1:-1] if bracketed else host, int(port))


def ipv6(text: str) -> Any:
    """Return a text as an ipaddress.IPv6Address, None where it is none."""
    import ipaddress  # 0.3 MB that few need

    try:
        return ipaddress.IPv6Address(text)
    except ValueError:
        return None


def optional_address(text: str) -> Optional[Server]:
    """Convert an address that may be missing."""
    return address(text) if text else None


def globs(text: str) -> tuple[str, ...]:
    """Convert globs of JIDs; localpart and domain are lower-cased as in every configured JID."""
    if not text:
        raise ValueError("nobody could ask; a lone * is everyone")
    parts = (glob.partition("/") for glob in text.split())
    return tuple(bare.lower() + slash + resource for bare, slash, resource in parts)


def glob_text(text: str) -> str:
    """Convert a glob of resources."""
    try:
        re.compile(fnmatch.translate(text))
    except re.error as error:
        raise ValueError(f"{text!r} is not a glob: {error}") from None
    if not text:
        raise ValueError("is empty: nobody could serve; * is every resource")
    return text


COMPONENT_KEYS = (
    Key("target_address", bare_jid, None, "the implementing client's bare JID"),
    Key("server", address, "localhost:5347", "the server's component port: host:port, [v6]:port or unix:/path"),
    Key("tls", word("no", "yes"), "no", "yes: TLS from the first byte, the certificate verified for the host"),
    Key("tls_ca", str, "", "a file of certificates (PEM) to trust instead of the system's"),
    Key("secret", str, "", "the component's secret, as the server has it"),
    Key("secret_file", str, "", "a file that holds the secret; $VARIABLES in the path are expanded"),
    Key("encoding", word("jid", "opaque"), "jid", "what the implementing client sees of a requester"),
    Key("timeout", seconds(), "30", "seconds for an answer"),
    Key("max_pending", whole_number(), "10000", "open requests of the component"),
    Key("max_pending_per_user", whole_number(), "1000", "open requests of one bare JID"),
    Key("max_stanza", whole_number(10000), "4194304", "bytes of one stanza received"),
    Key("max_send", whole_number(), "524288", "bytes of one stanza sent"),
    Key("policy", word(*POLICIES), "random", "which resource gets a request"),
    Key("resources", glob_text, "*", "glob of the target's resources that may serve"),
    Key("allow", globs, "*", "globs of those who are served"),
    Key("relay", words("message", "presence", "iq"), "", "what is relayed beyond the requests"),
)

DAEMON_KEYS = (
    Key("log_level", word("debug", "info", "warning", "error"), "info", "what is logged"),
    Key("drain", seconds(zero=True), "5", "seconds that open requests have when the daemon stops"),
    Key("metrics", optional_address, "", "where GET /metrics and GET /healthz are answered"),
)


class Configuration(NamedTuple):
    """A whole valid configuration."""

    components: dict[str, Component]
    log_level: str
    drain: float
    metrics: Optional[Server]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        """Say what would run, a line a component, without secrets."""
        lines = [
            f"{c.jid}: requests go to {c.target_address} (resources {c.resources}, {c.policy}), "
            f"server {c.server}{' with TLS' if c.tls else ''}, encoding {c.encoding}, timeout {c.timeout:g} s, "
            f"relay {' '.join(sorted(c.relay)) or 'nothing'}"
            for c in self.components.values()
        ]
        lines.append(f"log_level {self.log_level}, drain {self.drain:g} s, metrics {self.metrics or 'off'}")
        return "\n".join(lines)


class ConfigurationReader:
    """Reads one file and collects every mistake in it."""

    _LEFT_OUT = "\0"  # begins the names of sections that do not count
    _LOOPBACK = re.compile(r"localhost(\.localdomain)?|ip6-localhost|127(\.[0-9]{1,3}){3}", re.IGNORECASE)

    def __init__(self, path: str) -> None:
        self._path = path
        self._mistakes: dict[str, None] = {}  # in order, each once
        self._wrongs = 0  # one of [DEFAULT] counts for each component
        self._warnings: dict[str, None] = {}

    def read(self) -> Configuration:
        """Return the configuration, or raise ConfigurationError with a line for each mistake."""
        sections = self._sections()
        own = sections.pop("clientproxy", {})
        defaults = sections.pop("DEFAULT", {})
        self._unknown("DEFAULT", defaults, COMPONENT_KEYS)
        daemon = self._values("clientproxy", own, own, DAEMON_KEYS)
        components = {}
        for name, section in sections.items():
            component = self._component(name, section, defaults)
            if name.lower() in components or name.lower() in ("clientproxy", "default"):
                self._wrong(name, "", "stands twice in the file" if name.lower() in components else "is not so spelt")
            components[name.lower()] = component
        if not components and not self._mistakes:
            self._wrong("", "", "no component: a section named by its JID is needed, such as [proxy.domain.example]")
        for name, component in components.items():
            if component is not None and split_jid(component.target_address)[1] in components:
                self._wrong(name, "target_address", "is in the domain of a component of this file: a circle")
        if self._mistakes:
            raise ConfigurationError(*self._mistakes)
        good = {name: component for name, component in components.items() if component is not None}
        return Configuration(good, daemon["log_level"], daemon["drain"], daemon["metrics"], tuple(self._warnings))

    def _sections(self) -> dict[str, dict[str, str]]:
        lines = (self._text(self._path, "", "", 1 << 24) or "").split("\n")
        for _ in range(100):  # each time without the line that was wrong, to find the others
            parser = configparser.ConfigParser(default_section="", interpolation=None, empty_lines_in_values=False)
            try:
                parser.read_string("\n".join(lines))
                break
            except configparser.DuplicateSectionError as error:
                self._wrong(str(error.section), "", f"stands twice in the file, again on line {error.lineno}")
                lines[(error.lineno or 0) - 1] = f"[{self._LEFT_OUT}{error.lineno}]"
            except configparser.DuplicateOptionError as error:
                self._wrong(str(error.section), str(error.option), f"is given twice, again on line {error.lineno}")
                lines[(error.lineno or 0) - 1] = ""
            except configparser.MissingSectionHeaderError as error:
                self._wrong("", "", f"line {error.lineno} is outside a section: [proxy.domain.example] must come first")
                lines[error.lineno - 1] = f"[{self._LEFT_OUT}]"
            except configparser.ParsingError as error:  # its lines may hold a secret: only their numbers
                numbers = ", ".join(str(number) for number, _ in error.errors)
                self._wrong("", "", f"not of the form key = value: line {numbers}")
                break
        else:
            return {}
        return {name: dict(parser.items(name)) for name in parser.sections() if not name.startswith(self._LEFT_OUT)}

    def _component(self, name: str, section: dict[str, str], defaults: dict[str, str]) -> Optional[Component]:
        if not _DOMAIN.fullmatch(name):
            self._wrong(name, "", "the section's name is not a domain such as proxy.domain.example")
        given = dict(defaults)
        for key in {"secret", "secret_file"} & section.keys():  # takes the place of the other one's default
            given.pop("secret_file" if key == "secret" else "secret", None)
        given.update(section)
        before = self._wrongs
        values = self._values(name, given, section, COMPONENT_KEYS)
        values["secret"] = self._secret(name, given, values)
        values["tls"] = values.get("tls") == "yes" and self._has_tls(name)
        values["tls_ca"] = self._certificates(name, values)
        server = values.get("server")
        if server is not None:
            self._check_server(name, server, values["tls"])
        if self._wrongs > before:
            return None
        del values["secret_file"]
        return Component(jid=name.lower(), **values)

    def _values(self, name: str, given: dict[str, str], own: dict[str, str], keys: Iterable[Key]) -> dict[str, Any]:
        """Convert a section's values; `own` are those that stand in the section itself."""
        values: dict[str, Any] = {}
        self._unknown(name, own, keys)
        for key in keys:
            text = given.get(key.name, key.default)
            section = "DEFAULT" if key.name in given and key.name not in own else name
            if text is None:
                self._wrong(section, key.name, f"is missing: {key.help}")
            elif "\n" in text and key.name not in ("allow", "relay"):
                self._wrong(section, key.name, "goes on in the next line: that is indented, and must not be")
            else:
                try:
                    values[key.name] = key.convert(text)
                except ValueError as error:
                    self._wrong(section, key.name, str(error))
        return values

    def _unknown(self, name: str, own: dict[str, str], keys: Iterable[Key]) -> None:
        known = [key.name for key in keys]
        for key in own:
            if key not in known:
                self._wrong(name, key, f"is not a key here; there are {', '.join(known)}")

    def _secret(self, name: str, given: dict[str, str], values: dict[str, Any]) -> str:
        secret = str(values.get("secret", ""))
        if "secret" in given and given.get("secret_file"):
            self._wrong(name, "secret", "stands beside secret_file: only one of the two may be given")
        elif given.get("secret_file"):
            path = os.path.expandvars(given["secret_file"])
            text = self._text(path, name, "secret_file", 65536)
            secret = (text or "").rstrip("\r\n")
            if text is not None and (not secret or "\n" in secret):
                self._wrong(name, "secret_file", f"{path} does not hold a secret in one line")
        elif not secret:
            self._wrong(name, "secret", "is missing: the component's secret, or secret_file, a file that holds it")
        elif self._readable_by_others():
            self._warn("", "secret", "everybody on this machine can read this file and the secret in it: chmod 0640")
        return secret

    def _has_tls(self, name: str) -> bool:
        try:
            import ssl  # noqa: F401
        except ImportError as error:
            self._wrong(name, "tls", f"this Python has no TLS: {error}")
            return False
        return True

    def _certificates(self, name: str, values: dict[str, Any]) -> str:
        path = os.path.expandvars(values.get("tls_ca") or "")
        if not path:
            return ""
        if not values["tls"]:
            self._warn(name, "tls_ca", "has no effect without tls = yes")
            return ""
        text = self._text(path, name, "tls_ca", 1 << 24)
        if text is None:
            return ""
        text = text.encode("ascii", "replace").decode()  # comments may be in any language
        if not are_certificates(text):
            self._wrong(name, "tls_ca", f"{path} holds no certificates in PEM form")
        return text

    def _check_server(self, name: str, server: Server, tls: bool) -> None:
        if tls and not server.port:
            self._wrong(name, "tls", "a unix socket is not spoken to with TLS: tls = no")
        local = ipv6(server.host).is_loopback if ":" in server.host else self._LOOPBACK.fullmatch(server.host)
        if not tls and server.port and not local:
            self._warn(name, "server", "without tls = yes the stanzas go to another machine in the clear")

    def _text(self, path: str, name: str, key: str, limit: int) -> Optional[str]:
        try:
            with open(path, "rb") as file:
                data = file.read(limit + 1)
            if len(data) > limit:
                raise ValueError(f"has more than {limit} bytes")
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self._wrong(name, key, f"{path} is not UTF-8: byte {error.start + 1} is 0x{data[error.start]:02x}")
        except (OSError, ValueError) as error:
            self._wrong(name, key, f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")
        return None

    def _readable_by_others(self) -> bool:
        try:
            return bool(os.stat(self._path).st_mode & stat.S_IROTH)
        except OSError:
            return False

    def _wrong(self, section: str, key: str, what: str) -> None:
        self._mistakes[self._line(section, key, what)] = None
        self._wrongs += 1

    def _warn(self, section: str, key: str, what: str) -> None:
        self._warnings[self._line(section, key, what)] = None

    def _line(self, section: str, key: str, what: str) -> str:
        parts = (f"{self._path}:", section and f"[{section}]", key and f"{key}:", what)
        return " ".join(part for part in parts if part)


# -------------------------------------------------------------------- the log and the service manager

log = logging.getLogger("clientproxy")


class LineFormatter(logging.Formatter):
    """One line an event; what is not printable is escaped, so that nobody can write a line of his own."""

    _PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}  # sd-daemon(3)

    def __init__(self, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += ": " + self.formatException(record.exc_info)
        line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
        if self._journal:
            return f"<{self._PRIORITIES.get(record.levelname, 6)}>{line}"
        return f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S%z')} {record.levelname.lower()}: {line}"


class LogLimiter(logging.Filter):
    """At most 10 lines a second of one cause, the same message of the same component."""

    LINES, SECONDS = 10, 1.0

    def __init__(self) -> None:
        super().__init__()
        self._causes: dict[tuple[str, str], list[Any]] = {}  # -> [begin, lines, the last one left out]

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.DEBUG:  # who asks for it wants all of it
            return True
        subject = str(record.args[0]) if isinstance(record.args, tuple) and record.args else ""
        cause = self._causes.setdefault((str(record.msg), subject), [time.monotonic(), 0, ""])
        cause[1] += 1
        if cause[1] <= self.LINES:
            return True
        cause[2] = record.getMessage()
        return False

    def summarise(self, now: float) -> None:
        """Log what was suppressed in the seconds that have ended; called now and then."""
        ended = {key: cause for key, cause in self._causes.items() if now >= cause[0] + self.SECONDS}
        for key, (_, lines, last) in ended.items():
            del self._causes[key]
            if last:
                log.warning("%d more lines like this were left out: %s", lines - self.LINES, last)


def set_up_log(level: str) -> LogLimiter:
    """Log to stderr, in the journal's form where stderr is the journal (systemd.exec(5), JOURNAL_STREAM)."""
    handler, limiter = logging.StreamHandler(), LogLimiter()
    logging.raiseExceptions = False  # whoever reads stderr may be gone; that must not stop the daemon
    try:
        status = os.fstat(sys.stderr.fileno())
        journal = os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    except (OSError, ValueError, AttributeError):  # stderr is closed
        journal = False
    handler.setFormatter(LineFormatter(journal))
    handler.addFilter(limiter)
    log.handlers[:] = [handler]
    log.setLevel(level.upper())
    return limiter


def notify(message: str) -> None:
    """Tell the service manager, where there is one: sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto(message.encode(), "\0" + path[1:] if path[0] == "@" else path)
        except OSError as error:
            log.debug("the service manager does not listen: %s", error)


def resident_memory() -> int:
    """Return the process's resident memory in bytes, 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def trim_memory() -> None:
    """Give free memory back to the system, where its allocator can (glibc)."""
    gc.collect()
    try:
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)
    except (ImportError, OSError, AttributeError, MemoryError):
        pass  # another libc, or a system that forbids what ctypes needs


# ------------------------------------------------------------------------- one connection to a server


def addresses_of(server: Server, flags: int = 0) -> list[tuple[int, Any]]:
    """Look a host up: return families and socket addresses. Raises OSError, UnicodeError."""
    host = server.host.encode() if server.host.isascii() else server.host  # for a str Python loads IDNA: 0.3 MB
    found = socket.getaddrinfo(host, server.port, type=socket.SOCK_STREAM, flags=flags)
    return [(int(family), where) for family, _, _, _, where in found]


class TlsSocket:
    """TLS on a connected socket, which it takes over. What would block raises BlockingIOError, as there.

    ssl is not imported at the top: 1.4 MB that most do without.
    """

    def __init__(self, sock: socket.socket, host: str, authorities: str) -> None:
        """authorities: certificates to trust, PEM; '': the system's. Raises OSError where the socket has broken."""
        import ssl

        self._want_read, self._want_write = ssl.SSLWantReadError, ssl.SSLWantWriteError
        context = ssl.create_default_context(cadata=authorities or None)
        self._sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)

    def do_handshake(self) -> int:
        """Go on with the handshake; return the event to wait for, 0: it is done. Raises OSError."""
        try:
            self._sock.do_handshake()
        except self._want_read:
            return selectors.EVENT_READ
        except self._want_write:
            return selectors.EVENT_WRITE
        return 0

    def recv(self, size: int) -> bytes:
        """Receive as a socket does."""
        try:
            return self._sock.recv(size)
        except (self._want_read, self._want_write):
            raise BlockingIOError from None

    def send(self, data: memoryview) -> int:
        """Send as a socket does, but one record at a time: TLS tells of it only when it is gone as a whole."""
        try:
            return self._sock.send(data[:TLS_RECORD])
        except (self._want_read, self._want_write):
            raise BlockingIOError from None

    def fileno(self) -> int:
        """Return the descriptor, for the selector."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()


def are_certificates(text: str) -> bool:
    """Whether a text holds certificates in PEM form, and nothing broken."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):
        return False
    return True


class Outbox:
    """What is to be sent: whole stanzas, but for the first one, which may be sent in part."""

    def __init__(self) -> None:
        self._chunks: collections.deque[bytes] = collections.deque()
        self._offset = 0  # bytes of the first chunk that are sent
        self.size = 0

    def push(self, data: bytes) -> None:
        """Add whole stanzas."""
        self._chunks.append(data)
        self.size += len(data)

    def send_to(self, sock: Union[socket.socket, TlsSocket]) -> int:
        """Send what the socket takes; return how much that was."""
        before = self.size
        while self._chunks:
            chunk = self._chunks[0]
            try:
                sent = sock.send(memoryview(chunk)[self._offset :])
            except BlockingIOError:
                break
            self.size -= sent
            self._offset += sent
            if self._offset == len(chunk):
                self._chunks.popleft()
                self._offset = 0
        return before - self.size

    def answers(self) -> list[bytes]:
        """Return the answers and messages that were not sent, or not to their end."""
        return unsent_answers(b"".join(self._chunks), self._offset) if self._chunks else []


class Phase(Enum):
    """What a link is about."""

    WAITING = "waiting"  # until the next attempt
    RESOLVING = "resolving"
    CONNECTING = "connecting"
    SECURING = "securing"  # the TLS handshake
    STREAMING = "streaming"
    LINGERING = "lingering"  # our end of the stream is sent, the server's awaited
    STOPPED = "stopped"


class Link:
    """One component's way to its server: names, addresses, TLS, the stream, and again from the start."""

    def __init__(self, daemon: Daemon, component: Component) -> None:
        self.component = component
        self.phase = Phase.WAITING
        self.tried = False  # an attempt has ended, well or not
        self.connects = 0
        self.received = self.sent = 0  # bytes
        self.proxy = Proxy(component, daemon.domains, random.random, self.say)
        self.stopping = False
        self._next: Optional[Component] = None  # the configuration to come back with
        self._daemon = daemon
        self._deadline = 0.0  # of the phase
        self._addresses: list[tuple[int, Any]] = []
        self._last_addresses: list[tuple[int, Any]] = []
        self._where: Any = None
        self._failures: list[str] = []
        self._resolving = False
        self._attempts = 0
        self._sock: Union[socket.socket, TlsSocket, None] = None
        self._mask = 0
        self._stream: Optional[ComponentStream] = None
        self._ready_at = NEVER
        self._outbox = Outbox()
        self._moved_at = 0.0  # when the server last took something of it
        self._behind = False  # the last read may have left something unread
        self._deaf = False  # the server takes nothing any more

    def say(self, level: int, template: str, *arguments: object) -> None:
        """Log an event of this component."""
        log.log(level, "%s: " + template, self.component.jid, *arguments)

    def set_trace(self) -> None:
        """Log the starts of stanzas, if the log level has become debug, or no longer."""
        if self._stream is not None:
            debug = log.isEnabledFor(logging.DEBUG)
            self._stream.trace = (lambda way, start: self.say(logging.DEBUG, "%s: %s", way, start)) if debug else None

    @property
    def ready(self) -> bool:
        """Whether requests can come and go."""
        return self._stream is not None and self._stream.state is State.READY

    @property
    def waiting_output(self) -> int:
        """Bytes that wait to be sent."""
        return self._outbox.size

    # -- time

    def next_deadline(self) -> float:
        """Return when tick() has something to do."""
        if self.phase is Phase.LINGERING:
            return self._deadline
        if self._stream is None or not self.ready:
            return min(self._deadline, self.proxy.next_deadline())
        if self._outbox.size > PAUSE_READING:
            return self._moved_at + STALL
        stall = self._moved_at + STALL if self._outbox.size else NEVER
        return min(stall, self._stream.next_deadline(), self.proxy.next_deadline())

    def tick(self, now: float) -> None:
        """Do what is due, after what has arrived."""
        stream = self._stream
        if self.phase is Phase.STREAMING and stream is not None and self.ready:
            if self._outbox.size and now >= self._moved_at + STALL:
                self._over(now, f"the server has taken nothing for {STALL:.0f} s")
            elif self._outbox.size <= PAUSE_READING and self._catch_up(now) and self._stream is stream:
                self._tick_stream(stream, now)
            return
        if self.phase is not Phase.LINGERING:
            self.proxy.tick(now)
        if now >= self._deadline:
            self._late(now)

    def _tick_stream(self, stream: ComponentStream, now: float) -> None:
        stream.tick(now)
        if stream.state is State.READY:
            self.proxy.tick(now)
        else:
            self._changed(now)
        self._flush(now)

    def _late(self, now: float) -> None:
        """The phase has taken too long, or it is time for the next attempt."""
        if self.phase is Phase.WAITING:
            self._begin(now)
        elif self.phase is Phase.RESOLVING:
            self._use_addresses([], f"{self.component.server.host} is not resolved within {RESOLVE_WITHIN:.0f} s", now)
        elif self.phase is Phase.CONNECTING:
            self._address_failed(f"no answer within {CONNECT_WITHIN:.0f} s", now)
        elif self.phase in (Phase.SECURING, Phase.STREAMING):
            what = "TLS" if self.phase is Phase.SECURING else "handshake"
            self._over(now, f"no {what} within {HANDSHAKE_WITHIN:.0f} s")
        elif self.phase is Phase.LINGERING:
            self._over(now, "")

    # -- the way to a stream

    def _begin(self, now: float) -> None:
        self.phase, self._failures = Phase.RESOLVING, []
        self._deadline = now + RESOLVE_WITHIN
        host, port = self.component.server
        if not port:
            self._use_addresses([(socket.AF_UNIX, host)], "", now)
        elif not self._resolving:  # else a thread of an earlier attempt still waits for the resolver
            self._resolving = True
            self._daemon.resolve(host, port, self._resolved)

    def _resolved(self, addresses: list[tuple[int, Any]], error: str, now: float) -> None:
        self._resolving = False
        if self.phase is Phase.RESOLVING:
            self._use_addresses(addresses, error, now)

    def _use_addresses(self, addresses: list[tuple[int, Any]], error: str, now: float) -> None:
        if addresses:
            self._last_addresses = addresses
        elif self._last_addresses:
            self.say(logging.WARNING, "%s; trying its last addresses", error)
        else:
            self._failures.append(error)
        self._addresses = list(self._last_addresses)
        self._next_address(now)

    def _next_address(self, now: float) -> None:
        while self._addresses:
            family, self._where = self._addresses.pop(0)
            self.phase, self._deadline = Phase.CONNECTING, now + CONNECT_WITHIN
            try:
                self._sock = sock = socket.socket(family, socket.SOCK_STREAM)
                sock.setblocking(False)
                if family != socket.AF_UNIX:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                code = sock.connect_ex(self._where)
                if code not in (0, errno.EINPROGRESS):
                    raise OSError(code, os.strerror(code))
            except OSError as error:
                self._failures.append(f"{self._place()}: {error.strerror or error}")
                self._close_socket()
            else:
                self._listen_for(selectors.EVENT_WRITE)
                return
        self._over(now, "; ".join(self._failures) or "no address")

    def _place(self) -> str:
        return str(Server(*self._where[:2]) if isinstance(self._where, tuple) else Server(self._where, 0))

    def _address_failed(self, why: str, now: float) -> None:
        self._failures.append(f"{self._place()}: {why}")
        self._close_socket()
        self._next_address(now)

    def _connected(self, now: float) -> None:
        assert isinstance(self._sock, socket.socket)
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._address_failed(os.strerror(code), now)
            return
        self._deadline = now + HANDSHAKE_WITHIN
        if not self.component.tls:
            self._open_stream(now)
            return
        self.phase = Phase.SECURING
        self._listen_for(0)
        try:
            self._sock = TlsSocket(self._sock, self.component.server.host, self.component.tls_ca)
        except OSError as error:  # it has broken already
            self._over(now, f"TLS failed: {error.strerror or error}")
        else:
            self._secure(now)

    def _secure(self, now: float) -> None:
        assert isinstance(self._sock, TlsSocket)
        try:
            event = self._sock.do_handshake()
        except OSError as error:
            host, refused = self.component.server.host, getattr(error, "verify_message", "")
            if refused:  # it is an ssl.SSLCertVerificationError
                why = f"the server's certificate is not accepted: {refused}; is tls_ca its CA, and is {host} its name?"
            else:
                why = f"TLS failed: {error.strerror or error}; does the port speak TLS from the first byte?"
            self._over(now, why)
        else:
            if event:
                self._listen_for(event)
            else:
                self._open_stream(now)

    def _open_stream(self, now: float) -> None:
        c = self.component
        self.phase = Phase.STREAMING
        self._outbox, self._behind, self._deaf, self._moved_at = Outbox(), False, False, now
        self._stream = ComponentStream(c.jid, c.secret, c.max_stanza, c.max_send, self.proxy)
        self.set_trace()
        self._stream.open(now)
        self._listen_for(selectors.EVENT_READ)
        self._flush(now)

    # -- the stream

    def _event(self, mask: int) -> None:
        """The selector's callback."""
        now = time.monotonic()
        if self.phase is Phase.STREAMING:
            if mask & selectors.EVENT_READ:
                self._read(now)
            if mask & selectors.EVENT_WRITE and self._stream is not None:
                self._flush(now)
        elif self.phase is Phase.LINGERING:
            self._linger(now, mask)
        elif self.phase is Phase.CONNECTING:
            self._connected(now)
        elif self.phase is Phase.SECURING:
            self._secure(now)
        self._daemon.wake(self.next_deadline())

    def _read(self, now: float) -> None:
        """Read once, handle it, and send what comes of it: one pass for a whole batch of stanzas."""
        stream, sock = self._stream, self._sock
        assert stream is not None and sock is not None
        try:
            data = sock.recv(READ_SIZE)
        except BlockingIOError:
            self._behind = False
            return
        except OSError as error:
            self._over(now, f"the connection broke: {error.strerror or error}")
            return
        if not data:
            self._over(now, "the server closed the connection")
            return
        self._behind = len(data) == READ_SIZE or self.component.tls
        self.received += len(data)
        self.proxy.now = now
        stream.receive(data, now)
        if stream.state is not State.READY or self._ready_at == NEVER:
            self._changed(now)
        self._flush(now)

    def _changed(self, now: float) -> None:
        """The stream has become ready, or has ended."""
        stream = self._stream
        assert stream is not None
        if stream.state is State.READY:
            self._ready_at, self.tried = now, True
            self.connects += 1
            self.say(logging.INFO, "connected to %s, the stream is ready", self._place())
            self._daemon.changed()
        elif stream.state in (State.CLOSING, State.CLOSED):
            self._begin_lingering(now, LINGER_FAULT)

    def _catch_up(self, now: float) -> bool:
        """Read what has arrived already, so that nothing is declared late that is here; False: it ended."""
        for _ in range(CATCH_UP // READ_SIZE):
            if not self._behind or self.phase is not Phase.STREAMING or self._outbox.size > PAUSE_READING:
                break
            self._read(now)
        return self.phase is Phase.STREAMING

    def _flush(self, now: float) -> None:
        """The one way out for bytes."""
        stream, sock, outbox = self._stream, self._sock, self._outbox
        if stream is None or sock is None:
            return
        data = stream.data_to_send()
        waited = outbox.size
        if data:
            outbox.push(data)
        if outbox.size and not self._deaf:
            try:
                sent = outbox.send_to(sock)
            except OSError:  # what the server has sent is still read; then the connection is over
                self._deaf, sent = True, 0
            self.sent += sent
            if sent or not waited:
                self._moved_at = now
        if outbox.size or self._mask != selectors.EVENT_READ:
            self._choose_events()

    def _choose_events(self) -> None:
        """Read, unless too much waits to be sent: then the server has to wait too."""
        reading = self._outbox.size <= PAUSE_READING or self._deaf or self.phase is Phase.LINGERING
        writing = selectors.EVENT_WRITE if self._outbox.size and not self._deaf else 0
        self._listen_for((selectors.EVENT_READ if reading else 0) | writing)

    # -- the end of a stream

    def stop(self, now: float) -> None:
        """Answer what is open, end the stream, and do not come back."""
        self.stopping = True
        self._behind = self.ready and not self._daemon.renewing  # what has arrived is handled first, but for a flood
        if self.phase is Phase.STREAMING and self._catch_up(now) and self._stream is not None and self.ready:
            self.proxy.now = now
            self.proxy.answer_all("recipient-unavailable")
            self._stream.close()
            self._begin_lingering(now, LINGER_FAULT if self._daemon.renewing else LINGER)
            self._flush(now)
        elif self.phase not in (Phase.LINGERING, Phase.STOPPED):
            self._over(now, "")
        self._daemon.wake(self.next_deadline())

    def replace(self, component: Component, now: float) -> None:
        """Stop, and come back with another configuration once the server knows that the old stream is gone."""
        self._next = component
        self.stop(now)
        if self.phase is Phase.STOPPED:
            self._take_next()

    def restart(self) -> None:
        """Connect again after a stop()."""
        self.stopping, self.phase, self._deadline = False, Phase.WAITING, 0.0
        self._daemon.wake(0.0)

    def _take_next(self) -> None:
        if self._next is not None:
            old, self.component, self._next = self.proxy, self._next, None
            self.proxy = Proxy(self.component, self._daemon.domains, random.random, self.say)
            self.proxy.inherit(old)
            self._last_addresses, self._attempts = [], 0
            if not self._daemon.renewing:
                self.restart()

    def _begin_lingering(self, now: float, seconds: float) -> None:
        self.phase, self._deadline = Phase.LINGERING, now + seconds
        self._choose_events()

    def _linger(self, now: float, mask: int) -> None:
        """Write the rest, and wait until the server has read it: closing earlier could destroy it under way."""
        assert self._sock is not None
        if mask & selectors.EVENT_WRITE:
            self._flush(now)
        if mask & selectors.EVENT_READ and self.phase is Phase.LINGERING:
            try:
                data = self._sock.recv(READ_SIZE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if data and self._stream is not None:
                self.proxy.now = now
                self._stream.receive(data, now)
            if not data or self._stream is None or self._stream.state is State.CLOSED and not self._outbox.size:
                self._over(now, "")

    def _over(self, now: float, why: str) -> None:
        """The connection, or the attempt at one, has ended: keep what must be answered, decide when to try again."""
        stream, self._stream = self._stream, None
        failure = stream.failure if stream is not None else None
        was_ready = stream is not None and stream.was_ready
        ready_for = now - self._ready_at if was_ready else 0.0
        if self._addresses and why and failure is None and not was_ready and not self.stopping:
            self._address_failed(why, now)
            return
        if was_ready:
            self.proxy.lost(now, self._outbox.answers())
        if stream is not None:
            stream.release()
        self._close_socket()
        self._outbox, self._ready_at, self.tried = Outbox(), NEVER, True
        if self.stopping:
            self.phase, self._deadline = Phase.STOPPED, NEVER
            self._take_next()
        else:
            pause = self._pause(failure, was_ready, ready_for)
            self.phase, self._deadline = Phase.WAITING, now + pause
            self._say_why(failure, why or "the server ended the stream", was_ready, pause)
        self._daemon.changed()

    def _say_why(self, failure: Optional[Fault], why: str, was_ready: bool, pause: float) -> None:
        if failure is not None:
            why = REFUSALS.get(failure.condition, failure.detail) if failure.of_server else failure.detail
            why += f" (in a stanza of {failure.sender})" if failure.sender else ""
            why = f"{failure.condition}: {why}"
        begin = "the stream has ended" if was_ready else f"no stream to {self.component.server}"
        self.say(logging.WARNING, "%s: %s; next attempt in %.1f s", begin, why, pause)

    def _pause(self, failure: Optional[Fault], was_ready: bool, ready_for: float) -> float:
        """Return how long to wait: random, so that many clients of a server do not come back at once."""
        if failure is not None and failure.of_server and failure.condition in REFUSALS:
            return random.uniform(5.0, 20.0)
        if was_ready and failure is not None and failure.condition in STANZA_FAULTS:
            return random.uniform(0.1, 1.0)
        if ready_for >= STEADY:
            self._attempts = 0
        longest = min(60.0, 2.0**self._attempts)
        self._attempts = min(self._attempts + 1, 6)
        return random.uniform(0.1, longest)

    # -- the socket

    def _listen_for(self, mask: int) -> None:
        if self._sock is None or mask == self._mask:
            return
        if not self._mask:
            self._daemon.selector.register(self._sock, mask, self._event)
        elif not mask:
            self._daemon.selector.unregister(self._sock)
        else:
            self._daemon.selector.modify(self._sock, mask, self._event)
        self._mask = mask

    def _close_socket(self) -> None:
        self._listen_for(0)
        if self._sock is not None:
            self._sock.close()
            self._sock = None


# ------------------------------------------------------------------------------ figures for operators


def figures(link: Link) -> str:
    """Return the figures of a component as a line for the log."""
    proxy = link.proxy
    refused = sum(n for (kind, _), n in proxy.outcomes.items() if kind == "iq")
    return (
        f"{'ready' if link.ready else 'not connected'}, {len(proxy.roster.resources)} resources, "
        f"{len(proxy.requests)} requests open, {sum(proxy.answer_counts)} answered, {refused} refused or timed out, "
        f"{sum(proxy.dropped.values())} stanzas dropped, {link.connects} connects, "
        f"{link.received} bytes received, {link.sent} sent, {link.waiting_output} waiting"
    )


class Metric(NamedTuple):
    """A metric of the Prometheus text format, with a function that gives its samples for a link."""

    name: str
    kind: str
    help: str
    samples: Callable[[Link], Iterable[tuple[dict[str, str], float]]]


def _outcomes(link: Link, kind: str) -> list[tuple[dict[str, str], float]]:
    outcomes = {outcome: float(n) for (name, outcome), n in sorted(link.proxy.outcomes.items()) if name == kind}
    if kind == "iq":
        outcomes["answered"] = sum(link.proxy.answer_counts)
    return [({"outcome": outcome}, n) for outcome, n in outcomes.items()]


METRICS = (
    Metric("ready", "gauge", "Whether the component's stream is ready.", lambda c: [({}, c.ready)]),
    Metric("requests_total", "counter", "IQ requests that were answered, by outcome.", lambda c: _outcomes(c, "iq")),
    Metric("messages_total", "counter", "Messages relayed or refused.", lambda c: _outcomes(c, "message")),
    Metric("presences_total", "counter", "Presences relayed.", lambda c: _outcomes(c, "presence")),
    Metric("open_requests", "gauge", "Requests without an answer yet.", lambda c: [({}, len(c.proxy.requests))]),
    Metric("resources", "gauge", "Available resources that serve.", lambda c: [({}, len(c.proxy.roster.resources))]),
    Metric("suspect_resources", "gauge", "Resources that left several requests in a row unanswered.",
           lambda c: [({}, len(c.proxy.roster.suspects))]),
    Metric("connects_total", "counter", "Streams that became ready.", lambda c: [({}, c.connects)]),
    Metric("dropped_total", "counter", "Stanzas dropped, by reason.",
           lambda c: [({"reason": reason}, n) for reason, n in sorted(c.proxy.dropped.items())]),
    Metric("received_bytes_total", "counter", "Bytes received from the server.", lambda c: [({}, c.received)]),
    Metric("sent_bytes_total", "counter", "Bytes sent to the server.", lambda c: [({}, c.sent)]),
    Metric("waiting_bytes", "gauge", "Bytes waiting to be sent to the server.", lambda c: [({}, c.waiting_output)]),
)  # fmt: skip


def metrics_text(links: Iterable[Link]) -> str:
    """Return all metrics in Prometheus's text format, version 0.0.4."""
    lines, links = [], list(links)
    for metric in METRICS:
        name = f"clientproxy_{metric.name}"
        lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}"]
        for link in links:
            for labels, value in metric.samples(link):
                lines.append(_sample(name, {"component": link.component.jid, **labels}, value))
    name = "clientproxy_answer_seconds"
    lines += [f"# HELP {name} Time from a request to its answer.", f"# TYPE {name} histogram"]
    for link in links:
        component, count = {"component": link.component.jid}, 0
        for bound, n in zip([*map(str, ANSWER_SECONDS), "+Inf"], link.proxy.answer_counts):
            count += n
            lines.append(_sample(name + "_bucket", {**component, "le": bound}, count))
        lines.append(_sample(name + "_sum", component, link.proxy.answer_seconds))
        lines.append(_sample(name + "_count", component, count))
    name = "process_resident_memory_bytes"
    lines += [f"# HELP {name} Resident memory.", f"# TYPE {name} gauge", f"{name} {resident_memory()}"]
    return "\n".join(lines) + "\n"


def _sample(name: str, labels: dict[str, str], value: float) -> str:
    escaped = (f'{key}="{text}"' for key, text in labels.items())  # domains and words of ours: nothing to escape
    return f"{name}{{{','.join(escaped)}}} {value + 0!r}"


class MonitorClient(NamedTuple):
    """An HTTP client of the monitor: its socket, what it has asked so far, until when it may take its time."""

    sock: socket.socket
    asked: bytearray
    reply: bytearray
    deadline: float


class Monitor:
    """GET /metrics and GET /healthz over HTTP/1.0, on the loop, for a few clients at a time."""

    def __init__(self, server: Server, daemon: Daemon) -> None:
        """Bind; raises OSError where that cannot be done."""
        self.server = server
        self._daemon = daemon
        self._clients: list[MonitorClient] = []
        self._sock = self._bind_unix(server.host) if not server.port else self._bind_tcp(server)
        self._sock.setblocking(False)
        self._sock.listen(HTTP_CLIENTS)
        daemon.selector.register(self._sock, selectors.EVENT_READ, self._accept)

    @staticmethod
    def _bind_tcp(server: Server) -> socket.socket:
        family, where = addresses_of(server, socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
        except OSError:
            sock.close()
            raise
        return sock

    @staticmethod
    def _bind_unix(path: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                    probe.settimeout(1.0)
                    if probe.connect_ex(path) == errno.ECONNREFUSED:  # left by a daemon that was killed
                        os.unlink(path)
            before = os.umask(0o117)  # 0660
            try:
                sock.bind(path)
            finally:
                os.umask(before)
        except OSError:
            sock.close()
            raise
        return sock

    def close(self) -> None:
        """Stop listening, and leave every client alone."""
        for client in list(self._clients):
            self._end(client)
        self._daemon.selector.unregister(self._sock)
        self._sock.close()
        if not self.server.port:
            try:
                os.unlink(self.server.host)
            except OSError as error:
                log.warning("metrics: %s cannot be removed: %s", self.server.host, error.strerror)

    def next_deadline(self) -> float:
        """Return when the slowest client is to go."""
        return self._clients[0].deadline if self._clients else NEVER

    def tick(self, now: float) -> None:
        """Part from clients that take too long."""
        while self._clients and now >= self._clients[0].deadline:
            self._end(self._clients[0])

    def _accept(self, mask: int) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError:  # it has gone again, or there are no file descriptors: the next event tells
            return
        sock.setblocking(False)
        if len(self._clients) >= HTTP_CLIENTS:
            self._end(self._clients[0])  # the oldest: who asks properly is done in no time
        client = MonitorClient(sock, bytearray(), bytearray(), time.monotonic() + HTTP_WITHIN)
        self._clients.append(client)
        self._daemon.selector.register(sock, selectors.EVENT_READ, lambda mask: self._serve(client, mask))
        self._daemon.wake(client.deadline)

    def _serve(self, client: MonitorClient, mask: int) -> None:
        if client not in self._clients:
            return
        try:
            if mask & selectors.EVENT_READ and not client.reply:
                data = client.sock.recv(HTTP_REQUEST)
                client.asked.extend(data)
                if re.search(rb"\r?\n\r?\n", client.asked) or len(client.asked) > HTTP_REQUEST or not data:
                    client.reply.extend(self._reply(bytes(client.asked)))
                    self._daemon.selector.modify(
                        client.sock, selectors.EVENT_WRITE, lambda mask: self._serve(client, mask)
                    )
            if client.reply:
                del client.reply[: client.sock.send(client.reply)]
                if not client.reply:
                    self._end(client)
        except BlockingIOError:
            pass
        except OSError:  # the client has gone
            self._end(client)

    def _reply(self, request: bytes) -> bytes:
        method, _, path = request.split(b"\n")[0].partition(b" ")
        path = path.split(b" ")[0].partition(b"?")[0].strip()
        status, kind, text = "404 Not Found", "text/plain", "there are /metrics and /healthz\n"
        if method != b"GET":
            status, text = "405 Method Not Allowed", "only GET\n"
        elif path == b"/metrics":
            status, kind, text = "200 OK", "text/plain; version=0.0.4", metrics_text(self._daemon.links.values())
        elif path == b"/healthz":
            waiting = [link.component.jid for link in self._daemon.links.values() if not link.ready]
            status = "503 Service Unavailable" if waiting else "200 OK"
            text = f"not ready: {' '.join(waiting)}\n" if waiting else "ready\n"
        body = text.encode()
        head = f"HTTP/1.0 {status}\r\nContent-Type: {kind}; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"Connection: close\r\n\r\n" + body

    def _end(self, client: MonitorClient) -> None:
        if client in self._clients:  # else it has ended earlier in the same batch of events
            self._clients.remove(client)
            self._daemon.selector.unregister(client.sock)
            client.sock.close()


# --------------------------------------------------------------------------------------- the daemon


class Wakeup:
    """A pair of sockets through which signals, and threads that resolve names, reach the loop."""

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)

    def catch_signals(self) -> None:
        """From now on signals only write their number here; the loop acts on them."""
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: None)

    def wake(self) -> None:
        """Make the loop look at what has been done for it."""
        try:
            self._writer.send(b"\0")
        except BlockingIOError:
            pass  # it is awake already

    def read(self) -> bytes:
        """Return the numbers of the signals that have come, and zeros."""
        try:
            return self.reader.recv(4096)
        except BlockingIOError:
            return b""


class Daemon:
    """The loop, and what all components share: signals, names, the monitor, the service manager.

    The loop runs in a thread of its own, which is replaced when memory has grown: lxml keeps every
    name that it ever saw in a dictionary that only ends with its thread, and any remote user can
    make up names. All state but the streams outlives the thread.
    """

    def __init__(
        self, path: str, configuration: Configuration, limiter: LogLimiter, wakeup: Wakeup, verbose: bool
    ) -> None:
        """Raises OSError where the metrics address cannot be bound."""
        self.selector = selectors.DefaultSelector()
        self.domains: set[str] = set(configuration.components)
        self.links: dict[str, Link] = {}
        self.renewing = False  # this thread is to be replaced
        self._path = path
        self._verbose = verbose
        self._configuration = configuration
        self._limiter = limiter
        self._wakeup = wakeup
        self._done: collections.deque[Callable[[], None]] = collections.deque()  # by other threads, for the loop
        self._leaving: list[Link] = []  # stopped, but not yet gone
        self._status: Optional[int] = None  # exit status, once the loop is not to come back
        self._stop_at = NEVER
        self._stopping = False
        self._reload_wanted = False
        self._told = ""
        self._wake_at = 0.0
        self._housekeeping_at = 0.0
        self._memory_limit = 0  # bytes, set by each thread's first look
        self._fresh = True  # the thread has not looked yet
        self._watchdog = self._watchdog_interval()
        self._watchdog_at = 0.0 if self._watchdog else NEVER
        self._announced = False
        self._monitor = Monitor(configuration.metrics, self) if configuration.metrics is not None else None
        self.selector.register(wakeup.reader, selectors.EVENT_READ, self._woken)
        for component in configuration.components.values():
            self.links[component.jid] = Link(self, component)

    # -- for the links

    def wake(self, when: float) -> None:
        """Make the loop do what is due at that time."""
        if when < self._wake_at:
            self._wake_at = when

    def resolve(self, host: str, port: int, done: Callable[[list[tuple[int, Any]], str, float], None]) -> None:
        """Look up a name in a thread, as that can take long, and call done(addresses, error, now) on the loop."""

        def look_up() -> None:
            addresses, error = [], ""
            try:
                addresses = addresses_of(Server(host, port))
            except (OSError, UnicodeError) as failure:
                error = f"{host} is not resolved: {getattr(failure, 'strerror', None) or failure}"
            self._done.append(lambda: done(addresses, error, time.monotonic()))
            self._wakeup.wake()

        try:
            threading.Thread(target=look_up, name="resolver", daemon=True).start()
        except RuntimeError as failure:  # the system gives no more threads
            reason = f"{host} is not resolved: {failure}"
            self._done.append(lambda: done([], reason, time.monotonic()))
            self._wakeup.wake()

    def changed(self) -> None:
        """A link has become ready, or is no longer: tell the service manager, go on with what waited for it."""
        self._wake_at = 0.0
        if self._stopping or self.renewing:
            return
        links = list(self.links.values())
        if not self._announced and all(link.tried for link in links):
            self._announced = True
            notify("READY=1")
        waiting = [link.component.jid for link in links if not link.ready]
        text = f"not connected: {' '.join(waiting)}" if waiting else f"{len(links)} components are ready"
        if text != self._told:
            self._told = text
            notify(f"STATUS={text}")

    # -- the loop

    def run(self) -> int:
        """Run until a signal ends it; return the exit status."""
        while self._status is None:
            thread = threading.Thread(target=self._loop, name="loop")
            try:
                thread.start()
            except RuntimeError as error:
                log.error("the system gives no thread to run in: %s", error)
                return 1
            thread.join()
            trim_memory()
        if self._monitor is not None:
            self._monitor.close()
        return self._status

    def _loop(self) -> None:
        """One thread's life: events first, then what is due."""
        self.renewing = False
        self._wake_at = 0.0
        self._fresh = True
        monotonic, select = time.monotonic, self.selector.select
        while self._status is None and not self._renewed():
            pause = self._wake_at - monotonic()
            # After an interrupted wait Python does not look again, and what has arrived counts before what is late.
            for key, mask in select(pause if pause > 0 else 0) or select(0):
                key.data(mask)
            now = monotonic()
            if now >= self._wake_at:
                self._tick(now)

    def _tick(self, now: float) -> None:
        self._wake_at = NEVER
        for link in [*self.links.values(), *self._leaving]:
            if now >= link.next_deadline():
                link.tick(now)
        if now >= self._housekeeping_at:
            self._housekeep(now)
        if self._monitor is not None:
            self._monitor.tick(now)
            self.wake(self._monitor.next_deadline())
        if now >= self._watchdog_at:
            self._watchdog_at = now + self._watchdog
            notify("WATCHDOG=1")
        self._leave(now)
        for link in [*self.links.values(), *self._leaving]:
            self.wake(link.next_deadline())
        for when in (self._housekeeping_at, self._watchdog_at, self._stop_at):
            self.wake(when if when > now else NEVER)

    def _woken(self, mask: int) -> None:
        for number in self._wakeup.read():
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop()
            elif number == signal.SIGHUP:
                self._reload_wanted = True
            elif number == signal.SIGUSR1:
                for link in self.links.values():
                    link.say(logging.INFO, "figures: %s", figures(link))
        while self._done:
            self._done.popleft()()
        if self._reload_wanted and not self._stopping and not self.renewing:
            self._reload_wanted = False
            self._reload()
        self._wake_at = 0.0

    def _housekeep(self, now: float) -> None:
        self._housekeeping_at = now + 1.0
        self._limiter.summarise(now)
        memory = resident_memory()
        links = self.links.values()
        accounted = sum(len(link.proxy.requests) * BYTES_PER_REQUEST + 3 * link.waiting_output for link in links)
        if self._fresh:  # the limit rises only where a new thread did not bring enough
            room = MEMORY_HEADROOM // 2 if self._memory_limit else MEMORY_HEADROOM
            self._memory_limit = max(self._memory_limit, memory - accounted + room)
            self._fresh = False
        elif memory - accounted > self._memory_limit and not self._stopping and not self.renewing:
            trim_memory()
            if resident_memory() - accounted > self._memory_limit:
                self._renew(now, memory)

    # -- a new thread

    def _renew(self, now: float, memory: int) -> None:
        log.warning("the memory has grown to %d MiB: all streams are opened anew to free it", memory >> 20)
        self.renewing = True
        for link in self.links.values():
            link.stop(now)

    def _renewed(self) -> bool:
        """Whether every stream has ended, and a new thread can begin."""
        links = [*self.links.values(), *self._leaving]
        if not self.renewing or any(link.phase is not Phase.STOPPED for link in links):
            return False
        for link in self.links.values():
            link.restart()
        self._wakeup.wake()  # a reload may have waited
        trim_memory()  # in this thread, whose documents must not outlive it
        return True

    # -- the end

    def _stop(self) -> None:
        """Drain; a second signal ends at once."""
        if self._stopping:
            log.warning("a second signal: stopping at once")
            self._status = 0
            return
        now = time.monotonic()
        self._stopping, self._stop_at = True, now + self._configuration.drain
        owed = sum(link.proxy.owed() for link in self.links.values())
        log.info("stopping: %d open requests have %g s", owed, self._configuration.drain)
        notify("STOPPING=1\nSTATUS=stopping")
        for link in self.links.values():
            link.proxy.draining = True

    def _leave(self, now: float) -> None:
        """Go on with stopping: links whose requests are all answered, or whose time is over, end."""
        self._leaving = [link for link in self._leaving if link.phase is not Phase.STOPPED]
        if not self._stopping:
            return
        for link in self.links.values():
            if not link.stopping and (now >= self._stop_at or not link.proxy.owed()):
                link.stop(now)
        if all(link.phase is Phase.STOPPED for link in [*self.links.values(), *self._leaving]) and self._status is None:
            for link in self.links.values():
                if link.proxy.owed():
                    link.say(logging.WARNING, "%d requests stay unanswered: there is no connection", link.proxy.owed())
            log.info("stopped")
            self._status = 0

    # -- reload

    def _reload(self) -> None:
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            new = ConfigurationReader(self._path).read()
            monitor = self._monitor
            if new.metrics != self._configuration.metrics:
                monitor = Monitor(new.metrics, self) if new.metrics is not None else None
        except ConfigurationError as error:
            for mistake in error.args:
                log.error("%s", mistake)
            log.error("the configuration stays as it was")
        except (OSError, UnicodeError) as error:
            log.error("%s: [clientproxy] metrics: cannot be bound: %s; the configuration stays as it was",
                      self._path, getattr(error, "strerror", None) or error)  # fmt: skip
        else:
            self._apply(new, monitor)
        if self._announced:
            notify("READY=1")

    def _apply(self, new: Configuration, monitor: Optional[Monitor]) -> None:
        if monitor is not self._monitor and self._monitor is not None:
            self._monitor.close()
        self._monitor = monitor
        old, self._configuration = self._configuration.components, new
        log.setLevel("DEBUG" if self._verbose else new.log_level.upper())
        for warning in new.warnings:
            log.warning("%s", warning)
        self.domains.clear()
        self.domains.update(new.components)
        changed = [jid for jid, component in new.components.items() if old.get(jid) != component]
        log.info("reloaded: %d components, %d of them new or changed", len(new.components), len(changed))
        now = time.monotonic()
        known = {link.component.jid: link for link in [*self._leaving, *self.links.values()]}
        self.links = {jid: known.get(jid) or Link(self, component) for jid, component in new.components.items()}
        self._leaving = [link for jid, link in known.items() if jid not in new.components]
        for link in self._leaving:
            link.stop(now)
        for jid, link in self.links.items():
            if jid in changed and jid in known:
                link.replace(new.components[jid], now)
            link.set_trace()
        self.changed()

    @staticmethod
    def _watchdog_interval() -> float:
        """Return how often the service manager wants to hear from the loop, halved, or 0."""
        microseconds = os.environ.get("WATCHDOG_USEC", "")
        mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        return int(microseconds) / 2e6 if mine and microseconds.isdigit() else 0.0


# --------------------------------------------------------------------------------------------- main


def parse_arguments(arguments: Optional[list[str]]) -> argparse.Namespace:
    """Return the command line's options; a wrong one exits with 2."""
    parser = argparse.ArgumentParser(
        prog="clientproxy.py",
        description="XMPP component that hands IQ requests to the resources of a client and its answers back.",
        epilog="Signals: SIGTERM and SIGINT stop, SIGHUP reloads the configuration, SIGUSR1 logs figures.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100),  # else it imports shutil: 0.4 MB
    )
    parser.add_argument("-c", "--config", metavar="FILE", default="/etc/clientproxy.conf", help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="check the configuration and say what would run")
    parser.add_argument("-v", "--verbose", action="store_true", help="log everything, secrets and payloads apart")
    parser.add_argument("--version", action="version", version=f"clientproxy {__version__} (lxml {etree.__version__})")
    return parser.parse_args(arguments)


def crashed(failure: threading.ExceptHookArgs) -> None:
    """End the process for an error of this program itself: threading.excepthook."""
    assert failure.exc_value is not None
    log.critical("an error of this program itself", exc_info=failure.exc_value)
    os._exit(1)


def outlive_main(daemon: Daemon) -> int:
    """Run the daemon in a thread that begins when the main thread has ended, whose exit status is returned.

    Python keeps a script's syntax tree until its last line has run: 7 MB, a quarter of all. Then it waits for
    the other threads, and that is how the daemon spends its life.
    """

    def live() -> None:
        threading.main_thread().join()
        trim_memory()
        os._exit(daemon.run())  # at once: while Python takes itself apart, one more signal would kill it

    if sys.version_info[:2] == (3, 12):  # refuses new threads once the main one has ended
        return daemon.run()
    try:
        threading.Thread(target=live, name="daemon").start()
    except RuntimeError:  # the system gives none; Daemon.run() says so
        return daemon.run()
    return 0


def main(arguments: Optional[list[str]] = None) -> int:
    """Run as the command line says; return the exit status, 0 when the daemon has only begun."""
    options = parse_arguments(arguments)
    wakeup = Wakeup()
    wakeup.catch_signals()
    limiter = set_up_log("info")
    threading.excepthook = crashed
    try:
        configuration = ConfigurationReader(options.config).read()
    except ConfigurationError as error:
        for mistake in error.args:
            print(mistake, file=sys.stderr) if options.check else log.error("%s", mistake)
        return os.EX_CONFIG
    for warning in configuration.warnings:
        log.warning("%s", warning)
    if options.check:
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"  # there may be no stdout
        print(str(configuration).encode(encoding, "backslashreplace").decode(errors="replace"))
        return 0
    log.setLevel("DEBUG" if options.verbose else configuration.log_level.upper())
    if etree.LIBXML_VERSION < (2, 12):
        log.warning("libxml2 %s is slow with elements of very many attributes: a remote user can make this daemon "
                    "busy for seconds; 2.12 or newer is not", ".".join(map(str, etree.LIBXML_VERSION)))  # fmt: skip
    try:
        daemon = Daemon(options.config, configuration, limiter, wakeup, options.verbose)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        log.error("%s: [clientproxy] metrics: cannot be bound: %s", options.config, reason)
        return 1
    return outlive_main(daemon)


if __name__ == "__main__":
    sys.exit(main())
