#!/usr/bin/env python3
"""All tests of clientproxy, and its tools.

    python3 test_clientproxy.py [-v] [CLASS[.test] ...]     the tests; those with real servers skip where there are none
    python3 test_clientproxy.py demo                        the seed's conversation, as a picture
    python3 test_clientproxy.py bench | growth | servers | soak | fuzz | parser-random [...]

Units first, then the whole proxy against a model, the daemon as a process against a scripted server, against real
servers, its installation; the tools come last.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import collections
import collections.abc
import contextlib
import fnmatch
import functools
import hashlib
import http.client
import importlib.metadata
import importlib.util
import itertools
import logging
import os
import pathlib
import platform
import pwd
import queue
import random
import re
import select
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Callable, ClassVar, NamedTuple, Optional, Protocol, Union, cast, final
from unittest import mock
from xml.etree import ElementTree
from xml.parsers import expat
from xml.sax.saxutils import quoteattr

from lxml import etree

import clientproxy
from clientproxy import CONDITIONS, NS_COMPONENT, NS_STREAM, State

CLIENTPROXY = pathlib.Path(os.environ.get("CLIENTPROXY") or pathlib.Path(__file__).with_name("clientproxy.py"))
PATIENCE = 30.0  # seconds until something that should come at once counts as never: only a failing test waits so long
SLIXMPP_PYTHON = os.environ.get("CLIENTPROXY_SLIXMPP") or sys.executable  # an interpreter that has slixmpp
NS_DISCO, NS_COMMANDS = "http://jabber.org/protocol/disco#info", "http://jabber.org/protocol/commands"
DISCO = f"<query xmlns='{NS_DISCO}'/>"
RUN_SERVICE = """
import asyncio, service, sys

async def main():
    client = service.Service(*sys.argv[1:3])
    client.enable_starttls, client.enable_direct_tls, client.enable_plaintext = False, False, True
    client.plugin["feature_mechanisms"].unencrypted_plain = True
    client.connect("127.0.0.1", int(sys.argv[3]))
    await client.disconnected

asyncio.run(main())
"""  # the test's server has no TLS
Element = ElementTree.Element
Config = Mapping[str, Mapping[str, object]]


def until(condition: Callable[[], object], timeout: float = PATIENCE, what: Callable[[], str] | str = "") -> None:
    """Return as soon as `condition` holds; AssertionError after `timeout` seconds, which says what was waited for."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.02)


def skip_or_fail(reason: str) -> None:
    """What a test needs is not there: CI has to have it."""
    if os.environ.get("CLIENTPROXY_CI"):
        raise AssertionError(reason)
    raise unittest.SkipTest(reason)


def local(element: Element) -> str:
    return element.tag.rpartition("}")[2]


def condition(answer: Element) -> str:
    """`type/condition` of an error as the contract writes them, for instance wait/recipient-unavailable."""
    error = next((child for child in answer if local(child) == "error"), None)
    if error is None or not len(error):
        return ""
    return f"{error.get('type')}/{local(error[0])}"


ROUNDS = int(os.environ.get("CLIENTPROXY_ROUNDS", "0"))  # of the randomised tests; 0: about 5 s

JID, TARGET, SECRET, USER = "proxy.localhost", "impl@localhost", "geheim", "user@example.org/abc"
OPEN = f"<stream:stream xmlns='{NS_COMPONENT}' xmlns:stream='{NS_STREAM}'"
HEADER = f"<?xml version='1.0'?>{OPEN} from='{JID}' id='s1'>"
QUERY = "<query xmlns='urn:test'/>"

# ---------------------------------------------------------------------------------------------------------- helpers


class FakeClock:
    """A monotonic clock that stands until it is set."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now


class FakeSocket(socket.socket):
    """A socket that takes this many bytes, or as many at a time, and then would block."""

    def __init__(self, room: int, at_a_time: int = 1 << 30) -> None:
        super().__init__()
        self.close()
        self.room, self.at_a_time = room, at_a_time
        self.taken = b""

    def send(self, data: Any, flags: int = 0) -> int:
        size = min(self.room, self.at_a_time, len(data))
        if not size:
            raise BlockingIOError
        self.room -= size
        self.taken += bytes(data[:size])
        return size


def trickle(data: bytes, most: int = 500) -> Iterator[list[bytes]]:
    """Yield the same bytes whole, split at every place (long data: at `most` of them), and byte by byte."""
    yield [data]
    for at in range(1, len(data), -(-len(data) // most) or 1):
        yield [data[:at], data[at:]]
    yield [data[at : at + 1] for at in range(len(data))]


def line(element: Element) -> str:
    """A stanza as a line: `iq get ID FROM > TO`, after an error its condition, - for an absent attribute."""
    kind, id_, from_, to = (element.get(key, "-") for key in ("type", "id", "from", "to"))
    return f"{local(element)} {kind} {id_} {from_} > {to} {condition(element)}".rstrip()


def lines(elements: Iterable[Element]) -> list[str]:
    return [line(element) for element in elements]


def xml(name: str, content: str = "", **attributes: str | None) -> str:
    """A stanza; an attribute `from_` is `from`, one of value None is left out."""
    head = "".join(f" {key.rstrip('_')}={quoteattr(value)}" for key, value in attributes.items() if value is not None)
    return f"<{name}{head}>{content}</{name}>"


def iq(type: str | None = "get", id: str | None = "q1", from_: str | None = USER, to: str | None = JID,
       content: str = QUERY) -> str:
    return xml("iq", content, type=type, id=id, from_=from_, to=to)


def reply(request: Element, content: str = QUERY, type: str = "result") -> str:
    """The answer of whoever a request was sent to."""
    return iq(type, request.get("id"), request.get("to"), request.get("from"), content)


def message(from_: str = USER, to: str = JID, type: str | None = "chat", id: str | None = "m1") -> str:
    return xml("message", "<body>hello</body>", type=type, id=id, from_=from_, to=to)


def presence(from_: str, type: str | None = None, to: str = JID) -> str:
    return xml("presence", type=type, from_=from_, to=to)


def stanza_error(condition: str) -> str:
    return f"<error type='{CONDITIONS[condition]}'><{condition} xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"


def nested(levels: int) -> str:
    return "<n xmlns='urn:n'>" + "<n>" * (levels - 1) + "</n>" * levels


def canonical(element: Element) -> tuple[object, ...]:
    """What two elements have in common that mean the same, whatever their prefixes."""
    children = [(canonical(child), child.tail or "") for child in element]
    return element.tag, sorted(element.items()), element.text or "", children


class Reader:
    """Cuts a stream into the children of its root, with another parser than the daemon's."""

    def __init__(self, header: str = "") -> None:
        self._parser: Any = ElementTree.XMLPullParser(("start", "end"))
        self._depth = 0
        self.root: Element | None = None
        self.ended = False
        self.feed(header.encode())

    def feed(self, data: bytes) -> list[Element]:
        self._parser.feed(data)
        elements = []
        for event, element in self._parser.read_events():
            self._depth += 1 if event == "start" else -1
            if self.root is None:
                self.root = element
            elif self._depth == 1 and event == "end":
                elements.append(element)
            elif self._depth == 0:
                self.ended = True
        return elements


def elements_of(data: str | bytes) -> list[Element]:
    """The stanzas in some bytes of a stream."""
    return Reader(f"{OPEN}>").feed(data.encode() if isinstance(data, str) else data)


def component(jid: str = JID, **keys: str) -> clientproxy.Component:
    """A component with these keys, written as in a configuration file, and the defaults of the others."""
    texts = {"target_address": TARGET, "secret": SECRET, **keys}
    values = {key.name: key.convert(texts.get(key.name, key.default or "")) for key in clientproxy.COMPONENT_KEYS}
    del values["secret_file"]
    return clientproxy.Component(jid=jid, **{**values, "tls": values["tls"] == "yes"})


class Conversation:
    """Proxy and ComponentStream of one component, without sockets: server's bytes in, the daemon's stanzas out."""

    def __init__(self, *resources: str, seed: int = 1, jid: str = JID, domains: Iterable[str] = (),
                 **keys: str) -> None:
        self.component = component(jid, **keys)
        self.clock = FakeClock()
        self.log: list[str] = []
        self.proxy = clientproxy.Proxy(self.component, {jid, *domains}, random.Random(seed).random, self.say)
        self.greeting = self.connect(*resources)

    def say(self, level: int, template: str, *arguments: object) -> None:
        self.log.append(template % arguments)

    def connect(self, *resources: str, header: str = HEADER) -> list[Element]:
        """A new stream, on which these resources come; returns what the daemon sent until it was ready."""
        c = self.component
        self.reader = Reader()
        self.stream = clientproxy.ComponentStream(c.jid, c.secret, c.max_stanza, c.max_send, self.proxy)
        self.stream.open(self.clock.now)
        greeting = self.feed(header + "<handshake/>")
        self.come(*resources)
        return greeting

    def lose(self, *unsent: str) -> None:
        """The connection is lost, with these answers not written."""
        self.proxy.lost(self.clock.now, [text.encode() for text in unsent])

    def feed(self, *stanzas: str) -> list[Element]:
        """What the daemon sends when the server sends this."""
        self.proxy.now = self.clock.now
        self.stream.receive("".join(stanzas).encode(), self.clock.now)
        return self.sent()

    def ask(self, *stanzas: str) -> list[str]:
        return lines(self.feed(*stanzas))

    def sent(self) -> list[Element]:
        return self.reader.feed(self.stream.data_to_send())

    def wait(self, seconds: float) -> list[Element]:
        """What the daemon sends in these seconds, in which the server says nothing but gives back its pings."""
        return [element for _, element in self.watch(seconds)]

    def watch(self, seconds: float) -> list[tuple[float, Element]]:
        """wait(), each stanza with the seconds after which it came."""
        begin, found, ticks = self.clock.now, [], 0
        while True:
            due = min(self.proxy.next_deadline(), self.stream.next_deadline())
            if due > begin + seconds:
                break
            ticks = ticks + 1 if due <= self.clock.now else 0
            assert ticks < 5, f"next_deadline() stays at {due}, now is {self.clock.now}"
            self.clock.now = max(self.clock.now, due)
            self.stream.tick(self.clock.now)
            self.proxy.tick(self.clock.now)
            for element in self.sent():
                if element.get("to") == self.component.jid:
                    self.feed(iq(id=element.get("id"), from_=self.component.jid, to=self.component.jid))
                else:
                    found.append((self.clock.now - begin, element))
        self.clock.now = begin + seconds
        return found

    def come(self, *resources: str) -> list[str]:
        return self.ask(*(presence(f"{TARGET}/{name}") for name in resources))

    def go(self, *resources: str) -> list[str]:
        return self.ask(*(presence(f"{TARGET}/{name}", "unavailable") for name in resources))


def without_asking(answers: Iterable[str]) -> list[str]:
    """Lines without the daemon's own subscribe and probe."""
    return [text for text in answers if not re.match("presence (subscribe|probe) ", text)]


# ------------------------------------------------------------------------------------- addresses and errors


class TestAddresses(unittest.TestCase):
    """JIDs, quoting, error stanzas."""

    def test_jid_is_split_into_its_three_parts(self) -> None:
        table = {
            "d": ("", "d", ""), "l@d": ("l", "d", ""), "d/r": ("", "d", "r"), "l@d/r": ("l", "d", "r"),
            "d/l@e/r": ("", "d", "l@e/r"), "l@d/a/b@c": ("l", "d", "a/b@c"), "": ("", "", ""),
        }  # fmt: skip
        for jid, parts in table.items():
            with self.subTest(jid):
                self.assertEqual(clientproxy.split_jid(jid), parts)

    def test_text_of_a_jids_form_is_told_from_others(self) -> None:
        good = ("d", "d.example", "l@d", "l@d/r", "d/r", "ä@ö.example/ü", "l@d/r@s/t", "l@d/ r",
                f"{'l' * 1023}@d/{'r' * 1023}")
        bad = ("", "@d", "l@", "/r", "d/", "l@d/", "l@m@d", "l l@d", "l@d d", "l@d..e", ".d", "d.", "l<@d", "l:m@d",
               "l'@d", 'l"@d',
               "l&@d", "l@d\n", f"{'l' * 1024}@d", f"l@d/{'r' * 1024}", f"l@d/{'ü' * 512}", "d" * 1024)  # fmt: skip
        for jid in good:
            with self.subTest(jid[:20]):
                self.assertTrue(clientproxy.is_jid(jid))
        for jid in bad:
            with self.subTest(jid[:20]):
                self.assertFalse(clientproxy.is_jid(jid))

    def test_any_text_in_an_attribute_comes_back_from_a_parser(self) -> None:
        for text in ("", "a", "&amp;", "<a b='c'>", '"', "'", "\t\n\r ", "ü€\U0001f600", "]]>", "&#10;"):
            with self.subTest(text):
                element = elements_of(clientproxy.stanza("iq", {"id": text, "to": None}, "<a/>"))[0]
                self.assertEqual(element.attrib, {"id": text})

    def test_error_stanza_has_the_conditions_own_type(self) -> None:
        types = {
            "bad-request": "modify", "conflict": "cancel", "feature-not-implemented": "cancel", "forbidden": "auth",
            "item-not-found": "cancel", "not-allowed": "cancel", "policy-violation": "modify",
            "recipient-unavailable": "wait", "remote-server-timeout": "wait", "resource-constraint": "wait",
            "service-unavailable": "cancel",
        }  # fmt: skip
        self.assertEqual(set(types), set(CONDITIONS))
        for name, type_ in types.items():
            with self.subTest(name):
                answer = elements_of(clientproxy.error_stanza("iq", name, "a@b/<", "c/'", 'i"'))[0]
                self.assertEqual(line(answer), f"iq error i\" c/' > a@b/< {type_}/{name}")
                self.assertEqual(answer[0][0].tag, f"{{urn:ietf:params:xml:ns:xmpp-stanzas}}{name}")
        self.assertNotIn("id", elements_of(clientproxy.error_stanza("message", "conflict", "a", "b", None))[0].attrib)

    def test_condition_of_an_error_is_found_beside_text_and_application_conditions(self) -> None:
        ns = "urn:ietf:params:xml:ns:xmpp-stanzas"
        table = {
            f"<error><gone xmlns='{ns}'/></error>": "gone",
            f"<a xmlns='a'/><error><text xmlns='{ns}'/><x xmlns='b'/><conflict xmlns='{ns}'/></error>": "conflict",
            "<error/>": "", "<query xmlns='a'/>": "", "<error><gone/></error>": "",
        }  # fmt: skip
        for content, name in table.items():
            for namespace in (NS_COMPONENT, "jabber:client"):
                with self.subTest(content, namespace=namespace):
                    element: Any = etree.fromstring(f"<iq xmlns='{namespace}'>{content}</iq>")
                    self.assertEqual(clientproxy.error_condition(element), name)

    def test_description_of_a_stanza_has_no_payload(self) -> None:
        element: Any = etree.fromstring(iq(id="a\nb", content="<secret>word</secret>"))
        self.assertEqual(clientproxy.describe(element), f"iq type='get' id='a\\nb' from='{USER}' to='{JID}'")


# ------------------------------------------------------------------------------------------------- the parser


class Parsed(NamedTuple):
    """What became of a stream's bytes."""

    parser: clientproxy.StreamParser
    output: list[Element]  # the stanzas that were sent on
    large: list[str]  # ids of those too large for it

    @property
    def fault(self) -> str:
        return self.parser.fault.condition if self.parser.fault else ""

    @property
    def ids(self) -> list[str | None]:
        return [element.get("id") for element in self.output]


def parse(chunks: Iterable[bytes], max_stanza: int = 1 << 20, max_send: int = 1 << 20,
          keep: Callable[[Any], bool] = lambda element: True) -> Parsed:  # fmt: skip
    """Feed a StreamParser as a ComponentStream does, send on what keep() wants."""
    parser = clientproxy.StreamParser(max_stanza)
    reader, output, large = Reader(f"{OPEN}>"), [], []
    for chunk in chunks:
        elements = parser.feed(chunk)
        kept = [element for element in elements if keep(element)]
        for element in elements:
            if element not in kept:
                parser.discard(element)
        output += reader.feed(parser.take_output(len(kept), max_send,
                                                 lambda element: large.append(element.get("id") or "")))
        if parser.fault or parser.closed:
            break
    return Parsed(parser, output, large)


STANZAS = """
<iq type='get' id='1' from='a@b/c' xml:lang='de'><query xmlns='urn:a' b="'" c='"'>t&amp;&lt;ü€<d/>t</query></iq>
<message id='2'><body>&#x1F600; <![CDATA[<]]&gt;]]></body>
 <m:x xmlns:m='urn:m' m:a='1'><m:y xmlns='urn:z'><z/></m:y></m:x></message>
<presence id='3'/> <iq xmlns='jabber:client' id='4'><a xmlns='urn:a'/></iq>
<message id='5'><sent xmlns='urn:xmpp:carbons:2'><forwarded xmlns='urn:xmpp:forward:0'><message xmlns='jabber:client'
 from='x@y'><body>b</body></message><iq xmlns='jabber:component:accept' id='inner'/></forwarded></sent></message>
"""

# Payloads whose prefixes shadow the stream's own: moving them to another tree would change their namespaces.
SHADOWS = (
    "<iq xmlns:e='jabber:component:accept' id='1'><a xmlns:e='urn:evil'/></iq>",
    "<e:iq xmlns:e='jabber:component:accept' id='1'><a xmlns:e='urn:evil'><e:b/><c/></a><e:d/></e:iq>",
    "<iq id='1'><a xmlns:p='jabber:component:accept' xmlns='urn:a'><b/><p:c/></a></iq>",
    "<iq id='1'><a xmlns='urn:a' xmlns:stream='urn:b'><stream:c stream:d='1'/></a></iq>",
    "<iq id='1'><stream:error xmlns=''><a/></stream:error></iq>",
    "<iq id='1'><a xmlns=''><b xmlns='jabber:component:accept'/></a></iq>",
    "<iq xmlns='jabber:client' id='1'><iq xmlns='jabber:component:accept'><x xmlns='jabber:client'/></iq></iq>",
    "<iq id='1'><a xmlns='http://x/?a=1&amp;b=2' xmlns:p='urn:&lt;&amp;'><p:b p:c='&amp;&lt;'>&gt;</p:b></a></iq>",
)


class TestStreamParser(unittest.TestCase):
    """Bytes in, stanzas out, and out again as bytes; on both lxml versions the same."""

    @staticmethod
    def all_but(discarded: Iterable[str]) -> Callable[[Any], bool]:
        return lambda element: element.get("id") not in discarded

    def test_stream_split_anywhere_gives_the_same_stanzas(self) -> None:
        wanted = [canonical(element) for element in elements_of(STANZAS)]
        self.assertEqual(len(wanted), 5)
        for chunks in trickle((HEADER + STANZAS + "</stream:stream>").encode()):
            with self.subTest(chunks=len(chunks), first=len(chunks[0])):
                parsed = parse(chunks)
                self.assertEqual([canonical(element) for element in parsed.output], wanted)
                self.assertEqual((parsed.fault, parsed.parser.closed), ("", True))

    def test_stanza_within_a_stanza_is_none_of_its_own(self) -> None:
        self.assertEqual(parse([(HEADER + STANZAS).encode()]).ids, ["1", "2", "3", "4", "5"])

    def test_shadowed_prefixes_keep_their_namespaces(self) -> None:
        for text in SHADOWS:
            wanted = canonical(elements_of(text)[0])
            around = "<presence id='0'/>" + text + "<presence id='2'/><iq"
            for keep in (lambda element: True, lambda element: element.get("id") == "1"):
                with self.subTest(text):
                    self.assertIn(wanted, [canonical(element)
                                           for element in parse([HEADER.encode(), around.encode()], keep=keep).output])

    def test_header_with_other_prefixes_gives_the_same_stanzas(self) -> None:
        headers = (
            f"<s:stream xmlns='{NS_COMPONENT}' xmlns:s='{NS_STREAM}' id='1'>",
            f"{OPEN} xmlns:db='jabber:server:dialback' xmlns:m='urn:other' id='1' version='1.0' xml:lang='en'>",
            f"\n{OPEN}\n\tid = 'a>b'  >", f"\ufeff{HEADER}",
            f"<?xml version='1.0' encoding='UTF-8' standalone='yes'?>\n{OPEN} id='1'>",
        )  # fmt: skip
        for header in headers:
            wanted = [canonical(element) for element in Reader(header.strip("\ufeff\n")).feed(STANZAS.encode())]
            with self.subTest(header):
                for chunks in ([(header + STANZAS).encode()], [bytes([byte]) for byte in (header + STANZAS).encode()]):
                    parsed = parse(chunks)
                    self.assertEqual(parsed.fault, "")
                    self.assertEqual([canonical(element) for element in parsed.output], wanted)

    def test_language_of_the_header_is_known(self) -> None:
        self.assertEqual(parse([f"{OPEN} id='1' xml:lang='de'>".encode()]).parser.lang, "de")
        self.assertIsNone(parse([HEADER.encode()]).parser.lang)

    def test_half_open_last_stanza_waits_for_its_end(self) -> None:
        for cut, rest in (
            ("<iq", " id='2'><a/></iq>"), ("<iq id='2'", "/>"), ("<iq id='2'>", "</iq>"),
            ("<iq id='2'><a>", "</a></iq>"),
            ("<iq id='2'><a>text", "text</a></iq>"), ("<iq id='2'><a/>t", "</iq>"), ("<iq id='2'><a b='", "c'/></iq>"),
        ):  # fmt: skip
            chunks = [HEADER, "<iq id='0'/><iq id='1'/>" + cut, " " if cut.endswith(">") else "", rest, "<iq id='3'/>"]
            for discarded in ("", "1", "0", "01"):
                with self.subTest(cut, discarded=discarded):
                    parsed = parse([text.encode() for text in chunks], keep=self.all_but(discarded))
                    self.assertEqual(parsed.ids, [id_ for id_ in "0123" if id_ not in discarded])

    def test_discarded_stanzas_leave_no_trace(self) -> None:
        for discarded in itertools.chain.from_iterable(itertools.combinations("12345", size) for size in range(6)):
            parsed = parse([HEADER.encode(), STANZAS.encode()], keep=self.all_but(discarded))
            with self.subTest(discarded):
                self.assertEqual(parsed.ids, [id_ for id_ in "12345" if id_ not in discarded])
                assert parsed.parser.root is not None
                self.assertEqual(list(parsed.parser.root), [])

    def test_restricted_or_broken_xml_is_a_fault_after_what_was_complete(self) -> None:
        restricted, broken = ("restricted-xml",), ("not-well-formed",)
        table: dict[bytes, tuple[str, ...]] = {
            b"<!-- c -->": restricted, b"<?php x?>": restricted, b"<iq><!-- c --></iq>": restricted,
            b"<iq><?x y?></iq>": restricted,
            b"<!DOCTYPE a>": restricted + broken, b"<!DOCTYPE a [<!ENTITY b 'c'>]>": restricted + broken,
            b"<iq>&undefined;</iq>": restricted, b"<iq a='&undefined;'/>": restricted, b"<iq>&nbsp;</iq>": restricted,
            b"<iq></message>": broken, b"<iq a='1' a='2'/>": broken, b"<iq a=1/>": broken, b"<iq a='<'/>": broken,
            b"</iq>": broken,
            b"<iq>&#0;</iq>": broken, b"<iq>&#xD800;</iq>": broken, b"<iq>\x01</iq>": broken, b"<iq>\0</iq>": broken,
            b"\0": broken,
            b"<iq>\xff</iq>": broken, b"<iq>\xc0\x80</iq>": broken, b"<iq>\xed\xa0\x80</iq>": broken,
            b"<iq>]]></iq>": broken,
            b"<?xml version='1.0'?>": restricted + broken, b"<iq>& ;</iq>": restricted + broken, b"<<": broken,
        }  # fmt: skip
        before = f"{HEADER}<iq id='1'/><iq id='2'/>".encode()
        for text, conditions in table.items():
            behind = b"<iq id='3'/><iq id='4'/>"  # libxml2 looks at some faults only when more has come
            for chunks in ([before + text + behind], [before, text, behind],
                           [bytes([b]) for b in before + text + behind]):
                with self.subTest(text, chunks=len(chunks)):
                    parsed = parse(chunks)
                    self.assertIn(parsed.fault, conditions)
                    self.assertEqual(parsed.ids, ["1", "2"])

    def test_header_that_is_not_xep_0114s_is_a_fault(self) -> None:
        table = {
            f"<stream:stream xmlns='jabber:client' xmlns:stream='{NS_STREAM}' id='1'>": "invalid-namespace",
            f"<stream:stream xmlns:stream='{NS_STREAM}' id='1'>": "invalid-namespace",
            f"<stream:stream xmlns='{NS_COMPONENT}' xmlns:stream='urn:other' id='1'>": "invalid-namespace",
            f"<stream:features xmlns='{NS_COMPONENT}' xmlns:stream='{NS_STREAM}' id='1'>": "invalid-namespace",
            "<html>": "invalid-namespace", f"{OPEN}>": "bad-format", f"{OPEN} id=''>": "bad-format",
            f"<?xml version='1.0' encoding='ISO-8859-1'?>{OPEN} id='1'>": "unsupported-encoding",
            f"<?xml version='1.0' encoding='us-ascii'?>{OPEN} id='1'>": "unsupported-encoding",
            f"<?xml version='1.0' encoding=\"UTF-16\"?>{OPEN} id='1'>": "unsupported-encoding",
            f"\ufeff<?xml version='1.0' encoding='ISO-8859-1'?>{OPEN} id='1'>": "unsupported-encoding",
            f"<!DOCTYPE a>{OPEN} id='1'>": "restricted-xml",
            f"<!DOCTYPE a [<!ENTITY b SYSTEM '/etc/hostname'>]>{OPEN} id='&b;'>": "restricted-xml",
            f"<?xml version='1.0'?><!-- c -->{OPEN} id='1'>": "restricted-xml",
            f"<?x y?>{OPEN} id='1'>": "restricted-xml",
            "SSH-2.0-OpenSSH_9.2": "not-well-formed", "HTTP/1.1 400 Bad Request\r\n": "not-well-formed",
            "<<> ><>": "not-well-formed",
            f"{OPEN} a=''": "", "": "", "<": "", "\n": "",
        }  # fmt: skip
        for text, name in table.items():
            for chunks in trickle(text.encode(), 20):
                with self.subTest(text, chunks=len(chunks)):
                    self.assertEqual(parse(chunks).fault, name)

    def test_header_in_another_encoding_is_a_fault(self) -> None:
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
            with self.subTest(encoding):
                self.assertEqual(parse([HEADER.encode(encoding)]).fault, "unsupported-encoding")

    def test_endless_header_is_a_fault(self) -> None:
        parsed = parse([f"{OPEN} a='".encode(), *[b"a" * 10_000] * 20])
        self.assertEqual(parsed.fault, "policy-violation")

    def test_stanza_over_max_stanza_is_a_fault_that_names_its_sender(self) -> None:
        limit, read = 20_000, 1000
        endless = {
            "attribute": "<iq id='1' from='a@b/c' x='", "text": "<iq id='1' from='a@b/c'><a>",
            "CDATA": "<iq id='1' from='a@b/c'><![CDATA[",
            "children": "<iq id='1' from='a@b/c'>",
        }  # fmt: skip
        for kind, head in endless.items():
            for before in ("", "<iq id='0'/>"):
                with self.subTest(kind, before=before):
                    filling = b"<b/>" * (read // 4) if kind == "children" else b"b" * read
                    parser = clientproxy.StreamParser(limit)
                    parser.feed(HEADER.encode())
                    parser.take_output(len(parser.feed((before + head).encode())), limit, lambda element: None)
                    fed = 0
                    while parser.fault is None and fed < 3 * limit:
                        parser.take_output(len(parser.feed(filling)), limit, lambda element: None)
                        fed += read
                    self.assertEqual(parser.fault and parser.fault.condition, "policy-violation")
                    self.assertEqual(parser.fault and parser.fault.sender, "" if kind == "attribute" else "a@b/c")
                    self.assertLess(fed, limit + 2 * read)

    def test_stanzas_up_to_max_stanza_pass_however_many(self) -> None:
        stanza = f"<iq id='1'><a>{'b' * 9000}</a></iq>".encode()
        for size in (100, 4000, 65536):
            data = stanza * 20
            chunks = [data[at : at + size] for at in range(0, len(data), size)]
            with self.subTest(size):
                parsed = parse([HEADER.encode(), *chunks], max_stanza=10_000)
                self.assertEqual((parsed.fault, len(parsed.output)), ("", 20))

    def test_white_space_after_a_greater_than_sign_in_an_attribute_counts(self) -> None:
        for head in ("<iq a='>", "<!-- >", "<iq><a>", "<iq a='"):
            with self.subTest(head):
                parsed = parse([HEADER.encode(), f"<iq/>{head}".encode(), *[b" " * 1000] * 60], max_stanza=20_000)
                self.assertEqual(parsed.fault, "policy-violation")

    def test_stanza_over_max_send_is_handed_over_the_others_pass(self) -> None:
        large = f"<iq id='L'>{'<a/>' * 300}</iq>"
        for text, ids in {
            large: [], f"<iq id='1'/>{large}<iq id='2'/>": ["1", "2"], f"{large}<iq id='1'/>{large}<iq id='2'": ["1"],
            f"<iq id='1'/>{large}": ["1"], "<iq id='1'><a/></iq>" * 200: ["1"] * 200, f"{large}<iq id='2": [],
        }.items():  # fmt: skip
            for header in (HEADER, f"{OPEN} id='1' xmlns:x='urn:x'>"):
                with self.subTest(text[:20], header=header):
                    parsed = parse([header.encode(), text.encode(), b""], max_send=1000)
                    self.assertEqual(parsed.ids, ids)
                    self.assertEqual(parsed.large, ["L"] * text.count(large))
                    self.assertEqual(parsed.fault, "")

    def test_element_that_is_no_stanza_is_a_fault_after_what_was_complete(self) -> None:
        for strange in ("<foo/>", "<foo><a/></foo>", "<foo>", "<iq xmlns='urn:other'/>", "<stream:other/>"):
            for behind in ("", "<iq id='3'/>", "<iq id='3'"):
                for discarded in ("", "12"):
                    text = f"<iq id='1'/><iq id='2'/>{strange}{behind}"
                    with self.subTest(text, discarded=discarded):
                        parsed = parse([HEADER.encode(), text.encode()], keep=self.all_but(discarded))
                        self.assertEqual(parsed.fault, "unsupported-stanza-type")
                        self.assertEqual([id_ for id_ in parsed.ids if id_ != "3"], [] if discarded else ["1", "2"])

    def test_comment_is_a_fault_that_names_its_sender(self) -> None:
        iq = "<iq id='1' from='a@b/c'/>"
        for text, sender in ((f"{iq}<message from='x@y/z'><a><!-- c --></a></message>{iq}", "x@y/z"),
                             (f"{iq}<message from='x@y/z'><?p i?>", "x@y/z"), (f"{iq}<!-- c -->{iq}", ""),
                             (f"{iq}<message><a><iq from='x@y/z'><!-- c --></iq></a></message>{iq}", "")):
            for chunks in trickle(text.encode()):
                with self.subTest(text, chunks=len(chunks)):
                    parsed = parse([HEADER.encode(), *chunks])
                    self.assertEqual((parsed.fault, parsed.ids), ("restricted-xml", ["1"]))
                    self.assertEqual(parsed.parser.fault and parsed.parser.fault.sender, sender)

    def test_undeclared_prefix_is_a_fault_that_names_its_sender(self) -> None:
        """Namespaces in XML 1.0: lxml lets it pass, the server that gets it does not."""
        table = {
            "<iq id='3' from='a@b/c'><x:m/></iq>": "a@b/c", "<iq id='3' from='a@b/c'><m x:a='1'/></iq>": "a@b/c",
            "<iq id='3' from='a@b/c'><m xmlns:x='urn:x' x:a='1'/><x:m/></iq><iq id='4' from='d@e'/>": "a@b/c",
            "<iq id='3' from='a@b/c'><x:m/><n>": "a@b/c", "<x:m/>": "",
        }  # fmt: skip
        for text, sender in table.items():
            for before in ("", "<iq id='1'/>", "<iq id='1' from='x@y'><m xmlns:p='urn:p' p:a='1'/></iq>"):
                for discarded in ("", "1"):
                    with self.subTest(text, before=before, discarded=discarded):
                        parsed = parse([HEADER.encode(), (before + text).encode()], keep=self.all_but(discarded))
                        self.assertEqual(parsed.ids, ["1"] if before and not discarded else [])
                        self.assertEqual(parsed.fault, "not-well-formed")
                        self.assertEqual(parsed.parser.fault and parsed.parser.fault.sender, sender)

    def test_odd_namespace_names_are_no_fault(self) -> None:
        """A relative one is legitimate traffic; old versions of libxml2 write a line about each."""
        for name in ("vcard-temp", "not a uri", "urn:%%%"):
            parsed = parse([HEADER.encode(), *[f"<iq id='1'><v xmlns='{name}'/></iq>".encode()] * 2000])
            with self.subTest(name):
                self.assertEqual((parsed.fault, len(parsed.output)), ("", 2000))

    def test_deep_stanza_is_carried_or_is_a_fault_that_names_its_sender(self) -> None:
        for levels in (255, 300, 2000):
            with self.subTest(levels):
                parsed = parse([f"{HEADER}<iq id='1' from='a@b/c'>{nested(levels)}</iq>".encode()])
                self.assertEqual((parsed.fault, parsed.ids), ("", ["1"]))
        parsed = parse([f"{HEADER}<iq id='0'/><iq id='1' from='a@b/c'>{nested(20_000)}</iq>".encode()])
        if parsed.parser.fault:
            self.assertEqual((parsed.fault, parsed.parser.fault.sender, parsed.ids),
                             ("not-well-formed", "a@b/c", ["0"]))
        else:
            self.assertEqual(parsed.ids, ["0", "1"])

    def test_end_of_the_stream_comes_after_the_last_stanza(self) -> None:
        for chunks in trickle(f"{HEADER}<iq id='1'/></stream:stream>".encode(), 50):
            parsed = parse(chunks)
            self.assertEqual((parsed.ids, parsed.parser.closed, parsed.fault), (["1"], True, ""))
        self.assertTrue(parse([f"{OPEN} id='1'/>".encode()]).parser.closed)

    def test_keep_alive_spaces_leave_the_memory_flat(self) -> None:
        parser = clientproxy.StreamParser(100_000)
        parser.take_output(len(parser.feed(f"{HEADER}<iq id='1'/>".encode())), 1000, lambda element: None)
        before = clientproxy.resident_memory()
        for _ in range(400):
            self.assertEqual(parser.feed(b" \n" * 32768), [])
            parser.take_output(0, 1000, lambda element: None)
        self.assertIsNone(parser.fault)
        self.assertLess(clientproxy.resident_memory() - before, 8 << 20)

    def test_random_stanzas_keep_their_meaning(self) -> None:
        """Adversarial namespaces, any split, any choice of what is sent on."""
        for seed in range(ROUNDS or 150):
            rand = random.Random(seed)
            texts = [self._random_stanza(rand, str(number)) for number in range(8)]
            data = "".join(texts).encode()
            cuts = sorted(rand.sample(range(len(data)), 6))
            discarded = rand.sample("01234567", 3)
            chunks = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]
            parsed = parse([HEADER.encode(), *chunks], keep=self.all_but(discarded))
            with self.subTest(seed=seed):
                wanted = [canonical(elements_of(text)[0]) for n, text in enumerate(texts) if str(n) not in discarded]
                self.assertEqual([canonical(element) for element in parsed.output], wanted)

    def _random_stanza(self, rand: random.Random, id_: str) -> str:
        spaces = (NS_COMPONENT, "jabber:client", NS_STREAM, "urn:a", "urn:b")

        def element(depth: int, bound: dict[str, str], attributes: str = "", name: str = "") -> str:
            bound = dict(bound)
            declared = ""
            for prefix in rand.sample(["", "p", "q", "stream"], rand.randrange(3)):
                bound[prefix] = rand.choice(spaces + (("",) if not prefix else ()))
                declared += f" xmlns{prefix and ':' + prefix}='{bound[prefix]}'"
            prefixes = [prefix for prefix in bound if not name or bound[prefix] == NS_COMPONENT]
            if name and not prefixes:
                bound[""], declared = NS_COMPONENT, re.sub(" xmlns='[^']*'", "", declared) + f" xmlns='{NS_COMPONENT}'"
                prefixes = [""]
            prefix = rand.choice(prefixes)
            full = (prefix and prefix + ":") + (name or rand.choice("abc"))
            qualified = [prefix for prefix in bound if prefix]
            extra = f" {rand.choice(qualified)}:x='1'" if rand.random() < 0.3 else ""
            inner = "".join(rand.choice(["", "t", " ", "&lt;"]) + element(depth - 1, bound)
                            for _ in range(rand.randrange(3))) if depth else ""
            return f"<{full}{declared}{attributes}{extra}>{inner}</{full}>"

        return element(3, {"": NS_COMPONENT, "stream": NS_STREAM}, f" id='{id_}'",
                       rand.choice(["iq", "message", "presence"]))


# --------------------------------------------------------------------------------------- the component stream


class Listener:
    """A StanzaHandler that writes down what it is called with, and has the stanzas of `keep` sent on."""

    def __init__(self, keep: str = "") -> None:
        self.calls: list[str] = []
        self._keep = keep

    def ready(self, stream: clientproxy.ComponentStream, now: float) -> None:
        self.calls.append("ready")
        stream.send(b"<presence id='first'/>")

    def _note(self, name: str, element: Any) -> bool:
        self.calls.append(f"{name} {element.get('id')}")
        return name == self._keep

    def iq(self, element: Any) -> bool:
        return self._note("iq", element)

    def late(self, element: Any) -> bool:
        return self._note("late", element)

    def message(self, element: Any) -> bool:
        return self._note("message", element)

    def presence(self, element: Any) -> bool:
        return self._note("presence", element)

    def unsendable(self, element: Any) -> None:
        self._note("large", element)


def new_stream(listener: Listener, max_send: int = 10_000) -> tuple[clientproxy.ComponentStream, Reader]:
    """A stream at second 0 and a reader that has read its header."""
    stream = clientproxy.ComponentStream(JID, SECRET, 20_000, max_send, listener)
    stream.open(0.0)
    return stream, Reader(stream.data_to_send().decode())


class TestComponentStream(unittest.TestCase):
    """XEP-0114 §3 as a table: state by what arrives."""

    BEFORE = {
        State.OPENING: "",
        State.AUTHENTICATING: HEADER,
        State.READY: f"{HEADER}<handshake/>",
        State.CLOSING: f"{HEADER}<handshake/>",
        State.CLOSED: f"{HEADER}<handshake/></stream:stream>",
    }
    ARRIVES = {
        "header": HEADER[HEADER.index("<stream") :],
        "second header": "<stream:stream/>",
        "handshake": "<handshake/>",
        "error": "<stream:error><conflict xmlns='urn:ietf:params:xml:ns:xmpp-streams'/></stream:error>",
        "features": "<stream:features/>",
        "iq": "<iq id='1'/>",
        "message": "<message id='1'/>",
        "presence": "<presence xmlns='jabber:client' id='1'/>",
        "unknown": "<foo/>",
        "fault": "</foo>",
        "end": "</stream:stream>",
    }
    # state and event -> new state, condition of the failure, what the handler is called with
    TABLE = {
        (State.OPENING, "header"): (State.AUTHENTICATING, "", []),
        (State.OPENING, "fault"): (State.CLOSING, "not-well-formed", []),
        (State.OPENING, "unknown"): (State.CLOSING, "invalid-namespace", []),
        (State.OPENING, "iq"): (State.CLOSING, "invalid-namespace", []),
        (State.AUTHENTICATING, "second header"): (State.CLOSING, "unsupported-stanza-type", []),
        (State.AUTHENTICATING, "handshake"): (State.READY, "", ["ready"]),
        (State.AUTHENTICATING, "error"): (State.CLOSING, "conflict", []),
        (State.AUTHENTICATING, "features"): (State.AUTHENTICATING, "", []),
        (State.AUTHENTICATING, "iq"): (State.CLOSING, "not-authorized", []),
        (State.AUTHENTICATING, "message"): (State.CLOSING, "not-authorized", []),
        (State.AUTHENTICATING, "presence"): (State.CLOSING, "not-authorized", []),
        (State.AUTHENTICATING, "unknown"): (State.CLOSING, "unsupported-stanza-type", []),
        (State.AUTHENTICATING, "fault"): (State.CLOSING, "not-well-formed", []),
        (State.AUTHENTICATING, "end"): (State.CLOSED, "", []),
        (State.READY, "second header"): (State.CLOSING, "unsupported-stanza-type", []),
        (State.READY, "handshake"): (State.READY, "", []),
        (State.READY, "error"): (State.CLOSING, "conflict", []),
        (State.READY, "features"): (State.READY, "", []),
        (State.READY, "iq"): (State.READY, "", ["iq 1"]),
        (State.READY, "message"): (State.READY, "", ["message 1"]),
        (State.READY, "presence"): (State.READY, "", ["presence 1"]),
        (State.READY, "unknown"): (State.CLOSING, "unsupported-stanza-type", []),
        (State.READY, "fault"): (State.CLOSING, "not-well-formed", []),
        (State.READY, "end"): (State.CLOSED, "", []),
        (State.CLOSING, "second header"): (State.CLOSING, "", []),
        (State.CLOSING, "handshake"): (State.CLOSING, "", []),
        (State.CLOSING, "error"): (State.CLOSING, "conflict", []),
        (State.CLOSING, "features"): (State.CLOSING, "", []),
        (State.CLOSING, "iq"): (State.CLOSING, "", ["late 1"]),
        (State.CLOSING, "message"): (State.CLOSING, "", []),
        (State.CLOSING, "presence"): (State.CLOSING, "", []),
        (State.CLOSING, "unknown"): (State.CLOSING, "", []),
        (State.CLOSING, "fault"): (State.CLOSING, "", []),
        (State.CLOSING, "end"): (State.CLOSED, "", []),
        (State.CLOSED, "iq"): (State.CLOSED, "", []),
        (State.CLOSED, "error"): (State.CLOSED, "", []),
        (State.CLOSED, "end"): (State.CLOSED, "", []),
        (State.CLOSED, "fault"): (State.CLOSED, "", []),
    }

    def test_every_cell_of_the_table(self) -> None:
        for (state, event), (then, failure, calls) in self.TABLE.items():
            for chunks in ([self.ARRIVES[event].encode()], [bytes([byte]) for byte in self.ARRIVES[event].encode()]):
                with self.subTest(f"{state} {event}", chunks=len(chunks)):
                    listener = Listener()
                    stream, reader = new_stream(listener)
                    stream.receive(self.BEFORE[state].encode(), 0.0)
                    if state is State.CLOSING:
                        stream.close()
                    self.assertIs(stream.state, state)
                    stream.data_to_send()
                    listener.calls.clear()
                    for chunk in chunks:
                        stream.receive(chunk, 0.0)
                        if stream.state is State.CLOSED or stream.state is not state and failure:
                            break
                    self.assertEqual((stream.state, stream.failure.condition if stream.failure else ""),
                                     (then, failure))
                    self.assertEqual(listener.calls, calls)
                    ended = state is not State.CLOSING and state is not State.CLOSED and then in (State.CLOSING,
                                                                                                  State.CLOSED)
                    self.assertEqual(stream.data_to_send().count(b"</stream:stream>"), ended)

    def test_table_is_complete(self) -> None:
        """What arrives before the server's header has ended is all of it no header; else every cell is tested."""
        for state in (State.AUTHENTICATING, State.READY, State.CLOSING):
            self.assertEqual({event for s, event in self.TABLE if s is state}, set(self.ARRIVES) - {"header"})

    def test_handshake_is_that_of_the_specification(self) -> None:
        """XEP-0114 §3: lower-case hexadecimal SHA-1 of stream id and secret, the id unescaped."""
        table = {
            ("3BF96D32", "test"): "aaee83c26aeeafcbabeabfcbcd50df997e0a2a1e",
            ("a&amp;&lt;&#x41;", "test"): hashlib.sha1(b"a&<Atest").hexdigest(),
            ("1", "gehe\u00edm"): hashlib.sha1("1gehe\u00edm".encode()).hexdigest(),
        }
        for (id_, secret), digest in table.items():
            with self.subTest(id_):
                stream = clientproxy.ComponentStream(JID, secret, 20_000, 10_000, Listener())
                stream.open(0.0)
                reader = Reader()
                self.assertEqual(reader.feed(stream.data_to_send()), [])
                assert reader.root is not None
                self.assertEqual((reader.root.tag, reader.root.attrib), (f"{{{NS_STREAM}}}stream", {"to": JID}))
                stream.receive(f"{OPEN} id='{id_}'>".encode(), 0.0)
                (handshake,) = reader.feed(stream.data_to_send())
                self.assertEqual((handshake.tag, handshake.text), (f"{{{NS_COMPONENT}}}handshake", digest))

    def test_conversation_split_anywhere_is_the_same(self) -> None:
        stanzas = "<iq id='1'><a/></iq><message id='2'/><presence id='3'/>"
        for chunks in trickle(f"{HEADER}<stream:features/><handshake/> {stanzas}</stream:stream>".encode()):
            listener = Listener("iq")
            (stream, reader), sent = new_stream(listener), []
            for chunk in chunks:
                stream.receive(chunk, 0.0)
                sent += reader.feed(stream.data_to_send())
            with self.subTest(chunks=len(chunks), first=len(chunks[0])):
                self.assertEqual(listener.calls, ["ready", "iq 1", "message 2", "presence 3"])
                self.assertEqual(sorted(map(local, sent)), ["handshake", "iq", "presence"])
                self.assertTrue(reader.ended)
                self.assertIs(stream.state, State.CLOSED)

    def test_fault_is_told_after_what_was_complete(self) -> None:
        """RFC 6120 §4.9: the stream error and the end of our stream."""
        faults = {
            "<!-- c -->": "restricted-xml", "<a>&b;</a>": "restricted-xml", "</foo>": "not-well-formed",
            "<foo/>": "unsupported-stanza-type",
        }  # fmt: skip
        for text, name in faults.items():
            with self.subTest(text[:20]):
                listener = Listener("iq")
                stream, reader = new_stream(listener)
                stream.receive(f"{HEADER}<handshake/><iq id='1'/>{text}".encode(), 0.0)
                *_, error = reader.feed(stream.data_to_send())
                self.assertEqual(listener.calls, ["ready", "iq 1"])
                self.assertEqual((local(error), error[0].tag),
                                 ("error", f"{{urn:ietf:params:xml:ns:xmpp-streams}}{name}"))
                self.assertTrue(reader.ended)

    def test_stream_error_of_the_server_is_the_failure(self) -> None:
        ns = "urn:ietf:params:xml:ns:xmpp-streams"
        table = {
            f"<host-unknown xmlns='{ns}'/>": "host-unknown",
            f"<text xmlns='{ns}'>why</text><conflict xmlns='{ns}'/><x xmlns='urn:x'/>": "conflict",
            "": "undefined-condition", "<x xmlns='urn:x'/>": "undefined-condition",
        }  # fmt: skip
        for content, name in table.items():
            for before in (HEADER, f"{HEADER}<handshake/>"):
                with self.subTest(content):
                    stream, reader = new_stream(Listener())
                    stream.receive(f"{before}<stream:error>{content}</stream:error></stream:stream>".encode(), 0.0)
                    assert stream.failure is not None
                    self.assertEqual((stream.failure.condition, stream.state), (name, State.CLOSED))
                    self.assertEqual("why" in stream.failure.detail, "why" in content)
                    self.assertEqual(stream.was_ready, "<handshake/>" in before)

    def test_our_failure_stays_the_failure(self) -> None:
        stream, reader = new_stream(Listener())
        stream.receive(f"{HEADER}<handshake/>".encode(), 0.0)
        reader.feed(stream.data_to_send())
        fault = clientproxy.Fault("restricted-xml", "why", "a@b")
        stream.fail(fault)
        stream.fail(clientproxy.Fault("policy-violation", "later"))
        stream.receive(self.ARRIVES["error"].encode(), 0.0)
        self.assertEqual(stream.failure, fault)
        self.assertEqual(lines(reader.feed(stream.data_to_send())), ["error - - - > -"])

    def test_nothing_is_due_before_the_stream_is_ready(self) -> None:
        stream, _ = new_stream(Listener())
        for text in ("", HEADER):
            stream.receive(text.encode(), 0.0)
            stream.data_to_send()
            self.assertEqual(stream.next_deadline(), clientproxy.NEVER)
            stream.tick(1000.0)
            self.assertEqual((stream.data_to_send(), stream.failure), (b"", None))

    def test_stanza_over_max_send_reaches_the_handler(self) -> None:
        listener = Listener("iq")
        stream, reader = new_stream(listener, max_send=1000)
        stream.receive(f"{HEADER}<handshake/><iq id='1'>{'a' * 1000}</iq><iq id='2'/>".encode(), 0.0)
        self.assertEqual(listener.calls, ["ready", "iq 1", "iq 2", "large 1"])
        self.assertEqual(reader.feed(stream.data_to_send())[0].get("id"), "2")

    def test_trace_has_no_payload_and_no_secret(self) -> None:
        stream, reader = new_stream(Listener("iq"))
        traced: list[str] = []
        stream.trace = lambda way, start: traced.append(f"{way} {start}")
        stream.receive(f"{HEADER}<handshake/><iq id='1'><a>word</a></iq>".encode(), 0.0)
        self.assertIn("in iq id='1'", traced)
        self.assertIn("out iq id='1'", traced)
        digest = hashlib.sha1(f"s1{SECRET}".encode()).hexdigest()
        self.assertFalse([text for text in traced if re.search(f"word|{SECRET}|{digest}", text)])

    # -- liveness

    def _live(self, says: Callable[[float], bool], answers: bool, until: float = 2000.0) -> tuple[list[float],
                                                                                                  list[float], float]:
        """When the daemon wrote, when it pinged, and when it gave up; says(second): the server speaks then."""
        stream, reader = new_stream(Listener())
        stream.receive(f"{HEADER}<handshake/>".encode(), 0.0)
        reader.feed(stream.data_to_send())
        wrote, pinged = [0.0], []
        for now in map(float, range(1, int(until))):
            if says(now):
                stream.receive(b" ", now)
            if now >= stream.next_deadline() or not now % 7:
                stream.tick(now)
            data = stream.data_to_send()
            if data:
                wrote.append(now)
            for element in reader.feed(data):
                if local(element) == "iq":
                    self.assertEqual(line(element), f"iq get {element.get('id')} {JID} > {JID}")
                    self.assertEqual(element[0].tag, "{urn:xmpp:ping}ping")
                    pinged.append(now)
                    if answers:
                        stream.receive(iq("get", element.get("id"), JID, JID).encode(), now)
            if stream.state is not State.READY:
                self.assertEqual(stream.failure and stream.failure.condition, "connection-timeout")
                return wrote, pinged, now
        return wrote, pinged, 0.0

    def test_our_silence_never_lasts_three_minutes(self) -> None:
        for name, says in {"busy": lambda now: True, "slow": lambda now: now % 100 == 0,
                           "silent": lambda now: False}.items():
            with self.subTest(name):
                wrote, _, gone = self._live(says, True)
                self.assertEqual(gone, 0.0)
                self.assertLessEqual(max(b - a for a, b in zip(wrote, [*wrote[1:], 2000.0])), 180.0)

    def test_dead_connection_is_noticed_within_five_minutes(self) -> None:
        for last in (0.0, 1.0, 100.0, 149.0, 150.0, 151.0, 1000.0):
            with self.subTest(last):
                _, pinged, gone = self._live(last.__ge__, False)
                self.assertTrue(last + 60.0 < gone <= last + 300.0, gone)
                self.assertEqual(len(pinged), 1)

    def test_server_that_speaks_is_not_pinged(self) -> None:
        _, pinged, gone = self._live(lambda now: now % 120 == 0, False)
        self.assertEqual((pinged, gone), ([], 0.0))

    def test_any_byte_answers_a_ping(self) -> None:
        _, pinged, gone = self._live(lambda now: now % 200 == 0, False)
        self.assertTrue(pinged)
        self.assertEqual(gone, 0.0)


# ------------------------------------------------------------------------- resources, policies, tables


class TestPolicies(unittest.TestCase):
    """Which resource gets a request."""

    def _roster(self, names: str, policy: str, seed: int = 1) -> tuple[clientproxy.Roster, Callable[[str], str]]:
        roster, choose = clientproxy.Roster(), clientproxy.POLICIES[policy](random.Random(seed).random)
        for name in names:
            roster.add(f"{TARGET}/{name}", 0.0)
        return roster, lambda requester: choose.choose(roster, requester).jid[-1]

    def test_roster_lists_exactly_the_resources_that_are_there(self) -> None:
        rand, roster, model = random.Random(7), clientproxy.Roster(), set()
        for _ in range(2000):
            jid = f"r{rand.randrange(12)}"
            if jid not in model:
                roster.add(jid, 0.0)
                model.add(jid)
            elif rand.random() < 0.4:
                resource = roster.remove(jid)
                self.assertEqual(resource and (resource.jid, resource.pool), (jid, None))
                model.remove(jid)
            elif rand.random() < 0.5:
                roster.timed_out(roster.resources[jid])
            else:
                roster.trust(roster.resources[jid])
            listed = roster.trusted + roster.suspects
            self.assertEqual(sorted(resource.jid for resource in listed), sorted(model))
            self.assertEqual(set(roster.resources), model)
            self.assertTrue(all(r.pool is not None and r.pool[r.index] is r for r in listed))
        self.assertIsNone(roster.remove("nobody"))

    def test_three_timeouts_in_a_row_make_a_suspect_until_it_is_heard(self) -> None:
        roster, _ = self._roster("ab", "random")
        resource = roster.resources[f"{TARGET}/a"]
        self.assertEqual([roster.timed_out(resource), roster.timed_out(resource)], [False, False])
        roster.trust(resource)
        self.assertEqual([roster.timed_out(resource) for _ in range(5)], [False, False, True, False, False])
        self.assertEqual((roster.suspects, resource in roster.trusted), ([resource], False))
        roster.trust(resource)
        self.assertEqual((roster.suspects, len(roster.trusted), resource.timeouts), ([], 2, 0))

    def test_random_and_round_robin_spread_evenly(self) -> None:
        for policy, slack in (("random", 120), ("least-outstanding", 120), ("round-robin", 0)):
            with self.subTest(policy):
                _, choose = self._roster("abcd", policy)
                counts = collections.Counter(choose(USER) for _ in range(4000))
                self.assertEqual(set(counts), set("abcd"))
                for count in counts.values():
                    self.assertAlmostEqual(count, 1000, delta=slack)

    def test_random_is_not_in_turn(self) -> None:
        _, choose = self._roster("ab", "random")
        self.assertIn("aa", "".join(choose(USER) for _ in range(100)))

    def test_round_robin_goes_on_while_resources_come_and_go(self) -> None:
        roster, choose = self._roster("abc", "round-robin")
        for _ in range(20):
            roster.remove(f"{TARGET}/b")
            self.assertEqual({choose(USER), choose(USER)}, {"a", "c"})
            roster.add(f"{TARGET}/b", 0.0)
            self.assertEqual({choose(USER) for _ in range(3)}, {"a", "b", "c"})

    def test_least_outstanding_takes_one_with_the_fewest(self) -> None:
        roster, choose = self._roster("abcd", "least-outstanding")
        for name, count in zip("abcd", (2, 1, 3, 1)):
            roster.resources[f"{TARGET}/{name}"].open.update((name, str(number)) for number in range(count))
        counts = collections.Counter(choose(USER) for _ in range(1000))
        self.assertEqual(set(counts), {"b", "d"})
        self.assertAlmostEqual(counts["b"], 500, delta=80)

    def test_sticky_stays_while_the_resource_lives(self) -> None:
        roster, choose = self._roster("abcd", "sticky")
        users = [f"u{number}@d/r" for number in range(200)]
        first = {user: choose(user) for user in users}
        self.assertEqual(set(first.values()), set("abcd"))
        roster.add(f"{TARGET}/e", 0.0)
        gone = roster.remove(f"{TARGET}/a")
        self.assertIsNotNone(gone)
        then = {user: choose(user) for user in users}
        for user in users:
            self.assertEqual(then[user] == first[user], first[user] != "a")
        roster.add(f"{TARGET}/a", 0.0)
        self.assertEqual({user: choose(user) for user in users}, then)

    def test_sticky_leaves_a_suspect_while_there_is_another(self) -> None:
        roster, choose = self._roster("ab", "sticky")
        held = choose(USER)
        for _ in range(3):
            roster.timed_out(roster.resources[f"{TARGET}/{held}"])
        other = choose(USER)
        self.assertNotEqual(other, held)

    def test_sticky_forgets_the_least_recently_used(self) -> None:
        with mock.patch.object(clientproxy, "MAX_STICKY", 4):
            _, choose = self._roster("abcdefghijklmnopqrstuvwxyz", "sticky")
            first = {user: choose(user) for user in "1234"}
            self.assertEqual(choose("1"), first["1"])
            choose("5")  # puts 2 out
            self.assertEqual([choose(user) for user in "134"], [first[user] for user in "134"])
            for user in map(str, range(100)):
                choose(user)
            self.assertTrue(any(choose(user) != first[user] for user in "1234"))


class TestCodec(unittest.TestCase):
    """component/encoded-from and back."""

    def test_jid_is_written_as_it_is(self) -> None:
        codec = clientproxy.Codec(JID, SECRET, False, None)
        for user in (USER, "d", "d/r", "ä@ö.example/ü / @", f"u@d/{'r' * 1019}"):
            with self.subTest(user[:20]):
                self.assertEqual(codec.encode(user), f"{JID}/{user}")
                self.assertEqual(codec.decode(f"{JID}/{user}"), user)

    def test_address_that_no_jid_stands_in_decodes_to_nobody(self) -> None:
        for opaque in (False, True):
            codec = clientproxy.Codec(JID, SECRET, opaque, lambda jid: False)
            for address in (JID, f"{JID}/", f"{JID}/@d", f"{JID}/u@", f"{JID}/u@d/", f"{JID}/u u@d",
                            f"other.localhost/{USER}",
                            f"{JID}/.{'0' * 40}", f"{JID}x/{USER}", "", f"{JID}/."):  # fmt: skip
                with self.subTest(address, opaque=opaque):
                    self.assertIsNone(codec.decode(address))
        self.assertIsNone(clientproxy.Codec(JID, SECRET, True, lambda jid: False).decode(f"{JID}/{USER}"))

    def test_token_is_stable_tells_nothing_and_depends_on_the_secret(self) -> None:
        one = clientproxy.Codec(JID, SECRET, True, None).encode(USER)
        self.assertRegex(one, rf"\A{re.escape(JID)}/\.[0-9a-z]{{20,}}\Z")
        self.assertFalse(clientproxy.is_jid(one.partition("/")[2]))
        self.assertEqual(clientproxy.Codec(JID, SECRET, True, lambda jid: True).encode(USER), one)
        others = [clientproxy.Codec(*key, True, None).encode(USER) for key in ((JID, "other"), ("p.localhost", SECRET))]
        others += [clientproxy.Codec(JID, SECRET, True, None).encode(user)
                   for user in (USER + "d", USER[1:], USER.upper())]
        self.assertEqual(len({one.partition("/")[2], *(other.partition("/")[2] for other in others)}), 6)
        self.assertNotIn(hashlib.blake2b(USER.encode(), digest_size=20).hexdigest(), one)

    def test_jid_that_is_too_long_gets_a_token(self) -> None:
        codec = clientproxy.Codec(JID, SECRET, False, None)
        for resource, token in (("r" * 1019, False), ("r" * 1020, True), ("ü" * 509, False), ("ü" * 510, True),
                                ("€" * 300, False)):
            with self.subTest(resource[0] + str(len(resource))):
                address = codec.encode(f"u@d/{resource}")
                self.assertEqual(address.startswith(f"{JID}/."), token)
                self.assertLessEqual(len(address.partition("/")[2].encode()), 1023)

    def test_table_of_tokens_is_bounded_the_least_recently_used_go_first(self) -> None:
        with mock.patch.object(clientproxy, "MAX_TOKENS", 10):
            codec = clientproxy.Codec(JID, SECRET, True, lambda jid: jid == "busy@d")
            tokens = {user: codec.encode(user) for user in ["busy@d", *(f"u{number}@d" for number in range(9))]}
            self.assertTrue(all(codec.decode(token) == user for user, token in tokens.items()))
            codec.encode("u0@d")
            for number in range(8):
                codec.encode(f"new{number}@d")
            self.assertEqual([user for user, token in tokens.items() if codec.decode(token)], ["busy@d", "u0@d"])
            for number in range(1000):
                codec.encode(f"flood{number}@d")
            self.assertEqual(codec.decode(tokens["busy@d"]), "busy@d")
            known = sum(codec.decode(codec._prefix + token) is not None for token in map(str, ()))
            self.assertEqual(known, 0)
            self.assertLessEqual(len(codec._users), 11)

    def test_no_table_is_kept_where_nothing_is_relayed(self) -> None:
        codec = clientproxy.Codec(JID, SECRET, True, None)
        self.assertIsNone(codec.decode(codec.encode(USER)))


class TestOpenRequests(unittest.TestCase):
    """The table of open requests."""

    def _request(self, id_: str = "1", user: str = "u@d", started: float = 0.0, resource: Any = None,
                 of_target: bool = False) -> clientproxy.Request:
        resource = None if of_target else resource or clientproxy.Resource(f"{TARGET}/a", 0.0)
        return clientproxy.Request(f"{user}/r", JID, f"{TARGET}/a", id_, user, started, resource)

    def test_only_the_one_who_was_asked_answers_and_once(self) -> None:
        requests = clientproxy.OpenRequests(30.0, 10, 10)
        request = self._request()
        self.assertEqual(requests.add(("x", "1"), request), "")
        self.assertTrue(("x", "1") in requests)
        for key, sender in ((("x", "1"), f"{TARGET}/b"), (("x", "1"), TARGET), (("x", "1"), None),
                            (("x", "2"), request.answerer), (("y", "1"), request.answerer)):
            with self.subTest(f"{key} {sender}"):
                self.assertIsNone(requests.answer(key, sender))
        self.assertEqual(len(requests), 1)
        self.assertIs(requests.answer(("x", "1"), request.answerer), request)
        self.assertIsNone(requests.answer(("x", "1"), request.answerer))

    def test_caps_refuse_and_free_their_place(self) -> None:
        requests = clientproxy.OpenRequests(30.0, 3, 2)
        table = [("1", "u@d", ""), ("1", "u@d", "conflict"), ("2", "u@d", ""), ("3", "u@d", "resource-constraint"),
                 ("4", "v@d", ""),
                 ("5", "w@d", "resource-constraint")]  # fmt: skip
        for id_, user, refusal in table:
            with self.subTest(id_):
                self.assertEqual(requests.add((user, id_), self._request(id_, user)), refusal)
        self.assertEqual([requests.has_user(user) for user in ("u@d", "u@d/x", "v@d", "w@d")],
                         [True, True, True, False])
        requests.take([("u@d", "1")])
        self.assertEqual(requests.add(("u@d", "3"), self._request("3")), "")
        self.assertEqual(len(requests.take_all()), 3)
        self.assertFalse(requests.has_user("u@d"))

    def test_long_ids_have_a_bound_of_their_own(self) -> None:
        requests = clientproxy.OpenRequests(30.0, 10_000, 10_000)
        with mock.patch.object(clientproxy, "MAX_LONG_IDS", 1000):
            answers = [requests.add(("x", f"{number}" * 300), self._request(f"{number}" * 300)) for number in range(5)]
            self.assertEqual(answers, ["", "", "", "resource-constraint", "resource-constraint"])
            self.assertEqual(requests.add(("x", "short"), self._request("short")), "")
            requests.take([("x", "0" * 300)])
            self.assertEqual(requests.add(("x", "9" * 300), self._request("9" * 300)), "")

    def test_request_of_the_target_conflicts_with_itself_only(self) -> None:
        requests = clientproxy.OpenRequests(30.0, 10, 10)
        self.assertEqual(requests.add((JID, "f1"), self._request(of_target=True)), "")
        self.assertEqual(requests.add((JID, "f2"), self._request(of_target=True)), "conflict")
        self.assertEqual(requests.add((JID, "f2"), self._request("2", of_target=True)), "")
        requests.take_all()
        self.assertEqual(requests.add((JID, "f3"), self._request(of_target=True)), "")

    def test_overdue_are_taken_when_their_time_has_passed_not_before(self) -> None:
        requests = clientproxy.OpenRequests(30.0, 100, 100)
        requests.take_overdue(0.0)
        for number in range(10):
            requests.add(("x", str(number)), self._request(str(number), started=float(number)))
        self.assertLessEqual(requests.check_at, 30.0)
        self.assertEqual(requests.take_overdue(29.9), [])
        self.assertEqual([request.id for request in requests.take_overdue(32.5)], ["0", "1", "2"])
        self.assertEqual(requests.check_at, 33.0)
        self.assertEqual(len(requests.take_overdue(1000.0)), 7)
        self.assertEqual(requests.check_at, 1030.0)

    def test_resource_knows_its_open_requests(self) -> None:
        requests, resource = clientproxy.OpenRequests(30.0, 100, 100), clientproxy.Resource("r", 0.0)
        for id_ in "123":
            requests.add(("x", id_), self._request(id_, resource=resource))
        self.assertEqual(resource.open, {("x", "1"), ("x", "2"), ("x", "3")})
        requests.take([("x", "2")])
        requests.take_all()
        self.assertEqual(resource.open, set())


# --------------------------------------------------------------------------------------------- the proxy's rules


class TestProxy(unittest.TestCase):
    """"On the wire" of the contract; the rows stand in the docstrings."""

    PROBE, SUBSCRIBE = f"presence probe - {JID} > {TARGET}", f"presence subscribe - {JID} > {TARGET}"

    def refused(self, condition: str, id: str = "q1", to: str = USER, from_: str = JID, name: str = "iq") -> list[str]:
        return [f"{name} error {id} {from_} > {to} {CONDITIONS[condition]}/{condition}"]

    def forwarded(self, resource: str = "a", id: str = "q1", user: str = USER) -> list[str]:
        return [f"iq get {id} {JID}/{user} > {TARGET}/{resource}"]

    def answered(self, id: str = "q1", to: str = USER, from_: str = JID) -> list[str]:
        return [f"iq result {id} {from_} > {to}"]

    def empty(self, c: Conversation) -> None:
        """Nothing is left of any request."""
        self.assertEqual((len(c.proxy.requests), c.proxy.owed()), (0, 0))
        self.assertFalse([r.jid for r in c.proxy.roster.resources.values() if r.open])

    def test_connected_asks_for_presence_until_a_resource_is_known(self) -> None:
        """Handshake, then subscribe and probe; both again after 1, 2, 4 ... 300 s while no resource is known."""
        c = Conversation()
        self.assertEqual(sorted(lines(c.greeting)), ["handshake - - - > -", self.PROBE, self.SUBSCRIBE])
        rounds = c.watch(1800.0)
        asked = lines(element for _, element in rounds)
        self.assertEqual([{*pair} for pair in zip(asked[::2], asked[1::2])], [{self.PROBE, self.SUBSCRIBE}] * 13)
        moments = [0.0, *(moment for moment, _ in rounds[::2])]
        self.assertEqual([b - a for a, b in zip(moments, moments[1:])],
                         [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300, 300])
        c.come("a")
        self.assertEqual(c.wait(2000.0), [])
        self.assertEqual(c.go("a"), [])
        moments = [moment for moment, _ in c.watch(30.0)[::2]]
        self.assertEqual(moments, [1.0, 3.0, 7.0, 15.0])
        c.lose()
        self.assertEqual({*lines(c.connect())[1:]}, {self.PROBE, self.SUBSCRIBE})

    def test_request_goes_to_a_resource_and_its_answer_back(self) -> None:
        """The same IQ, id and payload kept, to a full JID of the target, from component/encoded-from; its result/error
        to the requester, from the address that was asked."""
        content = "<a xmlns='urn:a' b='&quot;&apos;&lt;'>t<c xmlns=''/>\u20ac</a>"
        error = content + stanza_error("item-not-found")
        for to, kind, type_ in itertools.product((JID, f"{JID}/x/y@z", f"node@{JID}"), ("get", "set"),
                                                 ("result", "error")):
            for id_ in ("1234", " <&'\" ", "x" * 5000):
                c = Conversation("a")
                with self.subTest(to=to, kind=kind, type=type_, id=id_[:9]):
                    (request,) = c.feed(iq(kind, id_, to=to, content=content))
                    wanted = elements_of(iq(kind, id_, f"{JID}/{USER}", f"{TARGET}/a", content))[0]
                    self.assertEqual(canonical(request), canonical(wanted))
                    (answer,) = c.feed(reply(request, content if type_ == "result" else error, type_))
                    wanted = elements_of(iq(type_, id_, to, USER, content if type_ == "result" else error))[0]
                    self.assertEqual(canonical(answer), canonical(wanted))
                    self.empty(c)

    def test_other_attributes_and_the_streams_language_are_kept(self) -> None:
        c = Conversation()
        c.lose()
        c.connect("a", header=HEADER.replace(" id=", " xml:lang='de' id="))
        for lang, wanted in ((None, "de"), ("fr", "fr"), ("", "")):
            stanza = xml("iq", QUERY, **{"type": "get", "id": "1", "from_": USER, "to": JID, "xml:lang": lang,
                                         "extra": "1"})
            (request,) = c.feed(stanza)
            self.assertEqual(request.get("{http://www.w3.org/XML/1998/namespace}lang"), wanted)
            self.assertEqual(request.get("extra"), "1")
            c.feed(reply(request))

    def test_reply_that_nobody_waits_for_is_dropped(self) -> None:
        """A second reply, a reply from another resource, a reply to nothing: dropped and counted (logged at most once a
        minute each)."""
        c = Conversation("a", "b", resources="a")
        (request,) = c.feed(iq())
        spoofed = [
            iq("result", "q1", sender, to) for sender, to in (
                (f"{TARGET}/b", f"{JID}/{USER}"), (TARGET, f"{JID}/{USER}"), ("evil@example.org/x", f"{JID}/{USER}"),
                (USER, f"{JID}/{USER}"), (f"{TARGET}/a", f"{JID}/other@example.org"), (f"{TARGET}/a", JID),
            )
        ] + [iq("error", "q2", f"{TARGET}/a", f"{JID}/{USER}"),
             iq("result", None, f"{TARGET}/a", f"{JID}/{USER}")]  # fmt: skip
        for text in spoofed:
            with self.subTest(text):
                self.assertEqual(c.ask(text), [])
        self.assertEqual(c.ask(reply(request)), self.answered())
        self.assertEqual(c.ask(reply(request)), [])
        self.assertEqual(sum(c.proxy.dropped.values()), len(spoofed) + 1)
        self.empty(c)
        logged = [text for text in c.log if "dropped" in text]
        self.assertEqual(len(logged), len(c.proxy.dropped))
        c.ask(reply(request))
        self.assertEqual(len([text for text in c.log if "dropped" in text]), len(logged))
        c.clock.now += 61.0
        c.ask(reply(request), reply(request))
        self.assertEqual(len([text for text in c.log if "dropped" in text]), len(logged) + 1)

    def test_second_request_of_the_same_id_conflicts(self) -> None:
        """A get/set with an id that the same requester has open: cancel/conflict."""
        c = Conversation("a", "b")
        (request,) = c.feed(iq())
        self.assertEqual(c.ask(iq()), self.refused("conflict"))
        self.assertEqual(c.ask(iq("set", to=f"{JID}/x")), self.refused("conflict", from_=f"{JID}/x"))
        (other,) = c.feed(iq(from_="v@d/r"))
        self.assertEqual(c.ask(reply(other)), self.answered(to="v@d/r"))
        self.assertEqual(c.ask(reply(request)), self.answered())
        self.assertEqual(len(c.ask(iq())), 1)

    def test_no_resource_is_told_by_how_long_the_stream_is_there(self) -> None:
        """cancel/service-unavailable; in the first 3 s of a stream on which none has been known yet
        wait/recipient-unavailable."""
        c = Conversation()
        self.assertEqual(c.ask(iq()), self.refused("recipient-unavailable"))
        c.wait(2.9)
        self.assertEqual(c.ask(iq()), self.refused("recipient-unavailable"))
        c.wait(0.2)
        self.assertEqual(c.ask(iq()), self.refused("service-unavailable"))
        c.lose()
        c.connect()
        self.assertEqual(c.ask(iq()), self.refused("recipient-unavailable"))
        c.come("a")
        c.go("a")
        self.assertEqual(c.ask(iq()), self.refused("service-unavailable"))

    def test_service_unavailable_is_passed_on_and_doubted(self) -> None:
        """Passed on as any answer; and, at most once a minute, a probe: where its answer within 10 s brings other
        resources, unavailable or unsubscribed but not this one, and nothing else came from it, it is forgotten."""
        def doubted(c: Conversation) -> tuple[str, list[str]]:
            (request,) = c.feed(iq())
            asked = (request.get("to") or "")[-1]
            return asked, c.ask(reply(request, stanza_error("service-unavailable"), "error"))

        probe = self.PROBE
        table: dict[str, tuple[Callable[[Conversation, str, str], object], bool]] = {
            "other resources": (lambda c, asked, other: c.come(other), True),
            "this one too": (lambda c, asked, other: c.come(other, asked), False),
            "this one late": (lambda c, asked, other: (c.come(other), c.wait(5.0), c.come(asked)), False),
            "nothing": (lambda c, asked, other: None, False),
            "too late": (lambda c, asked, other: (c.wait(10.1), c.come(other)), False),
            "an answer of it": (lambda c, asked, other: (c.feed(*self._answers(c, asked)), c.come(other)), False),
            "unavailable": (lambda c, asked, other: c.feed(presence(TARGET, "unavailable")), True),
            "unsubscribed": (lambda c, asked, other: c.feed(presence(TARGET, "unsubscribed")), True),
        }
        for name, (act, forgotten) in table.items():
            with self.subTest(name):
                c = Conversation("a", "b")
                asked, answers = doubted(c)
                self.assertIn(self.refused("service-unavailable")[0], answers)
                self.assertEqual(answers.count(probe), 1)
                c.clock.now += 1.0
                act(c, asked, "ab".replace(asked, ""))
                c.wait(11.0)
                self.assertEqual(f"{TARGET}/{asked}" not in c.proxy.roster.resources, forgotten)
        c = Conversation("a")
        self.assertEqual([probe in doubted(c)[1] for _ in range(5)], [True, False, False, False, False])
        c.wait(59.0)
        self.assertNotIn(probe, doubted(c)[1])
        c.wait(1.1)
        self.assertIn(probe, doubted(c)[1])

    @staticmethod
    def _answers(c: Conversation, resource: str) -> list[str]:
        """Requests of other users until this resource has got one, and its answer."""
        for number in itertools.count():
            (request,) = c.feed(iq(id=f"more{number}"))
            if request.get("to") == f"{TARGET}/{resource}":
                return [reply(request)]
        raise AssertionError

    def test_resource_that_was_forgotten_in_doubt_leaves_nobody_waiting(self) -> None:
        c = Conversation("a")
        _, doubted = c.feed(iq(id="open"), iq(id="doubted"))
        c.feed(reply(doubted, stanza_error("service-unavailable"), "error"))
        c.come("b")
        self.assertIn(self.refused("recipient-unavailable", "open")[0], lines(c.wait(11.0)))
        self.empty(c)

    def test_resources_that_are_doubted_together_are_forgotten_together(self) -> None:
        c = Conversation("a", "b", policy="round-robin")
        requests = c.feed(iq(id="1"), iq(id="2"))
        c.feed(*(reply(request, stanza_error("service-unavailable"), "error") for request in requests))
        c.come("c")
        c.wait(11.0)
        self.assertEqual(list(c.proxy.roster.resources), [f"{TARGET}/c"])

    def test_three_timeouts_make_a_resource_the_last_choice(self) -> None:
        """Three timeouts in a row: chosen only when there is no other, until something comes from it."""
        c = Conversation("a", "b", policy="round-robin", timeout="5", relay="message presence")
        late: list[Element] = []
        for number in range(10):
            (request,) = c.feed(iq(id=str(number)))
            if request.get("to") == f"{TARGET}/b":
                c.feed(reply(request))
            else:
                late.append(request)
            c.wait(6.0)
        self.assertEqual(len(late), 3)
        c.go("b")
        self.assertEqual(c.ask(iq()), self.forwarded("a"))
        self.assertEqual(c.ask(message(), presence(USER)),
                         [f"message chat m1 {JID}/{USER} > {TARGET}/a", f"presence - - {JID}/{USER} > {TARGET}/a"])
        c.come("b")
        self.assertEqual({c.ask(iq(id=f"r{number}"))[0][-1] for number in range(4)}, {"b"})
        c.feed(presence(f"{TARGET}/a"))
        self.assertEqual({c.ask(iq(id=f"s{number}"))[0][-1] for number in range(4)}, {"a", "b"})

    def test_anything_from_a_resource_restores_its_trust(self) -> None:
        for text in (presence(f"{TARGET}/a"), message(f"{TARGET}/a"), iq(from_=f"{TARGET}/a"), "late reply", "nothing"):
            with self.subTest(text):
                c = Conversation("a", timeout="5")
                (late,) = c.feed(iq())
                c.wait(6.0)
                c.ask(iq(), iq(id="q2"))
                c.wait(6.0)
                self.assertEqual(len(c.proxy.roster.suspects), 1)
                c.feed(reply(late) if text == "late reply" else "" if text == "nothing" else text)
                self.assertEqual(len(c.proxy.roster.suspects), text == "nothing")

    def test_answer_between_timeouts_keeps_the_trust(self) -> None:
        c = Conversation("a", "b", policy="round-robin", timeout="5")
        for round_ in range(3):
            for number in range(6):
                (request,) = c.feed(iq(id=f"{round_}.{number}"))
                if request.get("to") == f"{TARGET}/b" or number >= 4:
                    c.feed(reply(request))
                c.wait(6.0)
        self.assertEqual(c.proxy.roster.suspects, [])

    def test_resource_goes_offline_with_requests_open(self) -> None:
        """Each is answered wait/recipient-unavailable at once."""
        c = Conversation("a", "b")
        requests = c.feed(*(iq(id=str(number)) for number in range(20)))
        of_a = [request for request in requests if request.get("to") == f"{TARGET}/a"]
        self.assertTrue(0 < len(of_a) < 20)
        wanted = [self.refused("recipient-unavailable", request.get("id") or "")[0] for request in of_a]
        self.assertEqual(sorted(c.go("a")), sorted(wanted))
        self.assertEqual(c.ask(*(reply(request) for request in of_a)), [])
        self.assertEqual(len(c.ask(*(reply(request) for request in requests))), 20 - len(of_a))
        self.empty(c)

    def test_timeout_passes(self) -> None:
        """wait/remote-server-timeout; the late reply is dropped."""
        c = Conversation("a", timeout="7.5")
        (request,) = c.feed(iq(to=f"{JID}/x"))
        c.wait(3.0)
        c.feed(iq(id="q2"))
        self.assertEqual([(moment, line(answer)) for moment, answer in c.watch(20.0)], [
            (4.5, self.refused("remote-server-timeout", from_=f"{JID}/x")[0]),
            (7.5, self.refused("remote-server-timeout", "q2")[0]),
        ])  # fmt: skip
        self.assertEqual(c.ask(reply(request)), [])
        self.empty(c)

    def test_connection_lost(self) -> None:
        """Requests open on it are answered after the reconnect (wait/recipient-unavailable), at most 10 minutes later;
        answers written before are not repeated; the resources are learnt anew."""
        c = Conversation("a")
        requests = c.feed(*(iq(id=str(number)) for number in range(4)))
        c.feed(reply(requests[0]))
        c.lose(iq("result", "unsent", JID, USER), xml("message", "hello", from_=JID, to=USER))
        self.assertEqual(c.proxy.owed(), 5)
        c.clock.now += 599.0
        c.proxy.tick(c.clock.now)
        answers = lines(c.connect())
        wanted = [self.refused("recipient-unavailable", id_)[0] for id_ in "123"]
        wanted += [*self.answered("unsent"), f"message - - {JID} > {USER}"]
        self.assertEqual(sorted(without_asking(answers)[1:]), sorted(wanted))
        self.empty(c)
        self.assertEqual(c.ask(reply(requests[1])), [])
        self.assertEqual(c.ask(iq()), self.refused("recipient-unavailable"))
        c.come("b")
        self.assertEqual(c.ask(iq()), self.forwarded("b"))

    def test_connection_away_for_more_than_ten_minutes(self) -> None:
        for ticks in (True, False):
            with self.subTest(ticks=ticks):
                c = Conversation("a")
                c.feed(iq(id="old"))
                c.lose(iq("result", "unsent", JID, USER))
                c.clock.now += 300.0
                if not ticks:
                    c.connect("a")
                    c.feed(iq(id="young"))
                    c.lose()
                c.clock.now += 301.0
                deadline = c.proxy.next_deadline()
                self.assertLessEqual(deadline, c.clock.now + 301.0)
                if ticks:
                    c.proxy.tick(c.clock.now)
                    self.assertEqual(c.proxy.owed(), 0)
                wanted = [] if ticks else self.refused("recipient-unavailable", "young")
                self.assertEqual(without_asking(lines(c.connect()))[1:], wanted)
                self.empty(c)

    def test_lost_twice_before_an_answer_could_be_written(self) -> None:
        c = Conversation("a")
        c.feed(iq(id="1"))
        c.lose()
        c.proxy.lost(c.clock.now + 1.0, [])
        self.assertEqual(without_asking(lines(c.connect()))[1:], self.refused("recipient-unavailable", "1"))

    def test_new_proxy_of_the_component_inherits_what_is_owed(self) -> None:
        old, new = Conversation("a"), Conversation()
        old.feed(iq(id="1"))
        old.lose(iq("result", "2", JID, USER))
        new.lose()
        new.proxy.inherit(old.proxy)
        self.assertEqual(sorted(without_asking(lines(new.connect()))[1:]),
                         self.refused("recipient-unavailable", "1") + self.answered("2"))

    def test_request_of_a_component_of_this_daemon_is_a_loop(self) -> None:
        """IQ get/set from a requester in the domain of a component of this daemon: cancel/not-allowed."""
        for relay in ("", "message presence iq"):
            c = Conversation("a", domains=["second.localhost"], relay=relay)
            for sender in ("second.localhost", "second.localhost/x", "u@second.localhost/x", f"u@{JID}"):
                with self.subTest(sender):
                    self.assertEqual(c.ask(iq(from_=sender)), self.refused("not-allowed", to=sender))
            self.assertEqual(c.ask(iq(from_="u@sub.second.localhost")), self.forwarded(user="u@sub.second.localhost"))

    def test_own_ping_comes_back(self) -> None:
        """IQ from the component to itself: the daemon's own liveness ping, taken as a sign of life."""
        c = Conversation("a")
        for text in (iq(from_=JID, to=JID, content="<ping xmlns='urn:xmpp:ping'/>"),
                     iq("result", from_=JID, to=JID, content=""),
                     iq("error", "alive", JID, JID, stanza_error("feature-not-implemented"))):  # fmt: skip
            self.assertEqual(c.ask(text), [])
        self.assertEqual(c.proxy.dropped, collections.Counter())

    def test_request_of_the_target_without_relay(self) -> None:
        """IQ get/set from a client of the target to the component: cancel/not-allowed."""
        c = Conversation("a", relay="message presence")
        for sender in (f"{TARGET}/a", f"{TARGET}/unknown", TARGET):
            for to in (JID, f"{JID}/{USER}"):
                self.assertEqual(c.ask(iq(from_=sender, to=to)), self.refused("not-allowed", to=sender, from_=to))

    def test_request_of_the_target_is_relayed(self) -> None:
        """With relay = iq and a to of component/encoded-from: to that JID from the component under a fresh id, the
        answer back under its own; only an available resource that matches resources may ask; an address that doesn't
        decode: cancel/item-not-found."""
        for encoding in ("jid", "opaque"):
            with self.subTest(encoding):
                c = Conversation("a", "b", "other", relay="iq", encoding=encoding, resources="[ab]")
                (request,) = c.feed(iq())
                address = request.get("from") or ""
                content = "<ask xmlns='urn:ask'/>"
                asked = [c.feed(iq("set", "same", f"{TARGET}/{name}", address, content))[0] for name in "ab"]
                self.assertEqual(len({"same", *(element.get("id") for element in asked)}), 3)
                for name, element in zip("ab", asked):
                    self.assertEqual((element.get("from"), element.get("to"), element[0].tag),
                                     (JID, USER, "{urn:ask}ask"))
                    self.assertEqual(c.ask(iq("result", element.get("id"), "evil@d/r", JID)), [])
                    self.assertEqual(c.ask(iq("result", element.get("id"), USER.partition("/")[0], JID)), [])
                    (answer,) = c.feed(reply(element, content))
                    self.assertEqual(line(answer), f"iq result same {address} > {TARGET}/{name}")
                    self.assertEqual(answer[0].tag, "{urn:ask}ask")
                    self.assertEqual(c.ask(reply(element)), [])
                table = {
                    (f"{TARGET}/other", address): "not-allowed", (f"{TARGET}/gone", address): "not-allowed",
                    (TARGET, address): "not-allowed", (f"{TARGET}/a", JID): "not-allowed",
                    (f"{TARGET}/a", f"{JID}/.{'0' * 40}"): "item-not-found",
                    (f"{TARGET}/a", f"{JID}/@"): "item-not-found",
                }  # fmt: skip
                for (sender, to), name in table.items():
                    with self.subTest(sender, to=to):
                        self.assertEqual(c.ask(iq(from_=sender, to=to)), self.refused(name, to=sender, from_=to))
                self.assertEqual(c.ask(reply(request)), self.answered())
                self.empty(c)

    def test_relayed_request_of_the_target_is_answered_in_any_case(self) -> None:
        """Timeout, exactly one answer and caps as in the other direction."""
        address = f"{JID}/{USER}"
        for end in ("timeout", "loss", "too many", "same id", "bad"):
            c = Conversation("a", relay="iq", timeout="5", max_pending_per_user="2")
            with self.subTest(end):
                self.assertEqual(len(c.feed(iq(id="1", from_=f"{TARGET}/a", to=address))), 1)
                if end == "timeout":
                    self.assertEqual(lines(c.wait(5.0)),
                                     self.refused("remote-server-timeout", "1", f"{TARGET}/a", address))
                elif end == "loss":
                    c.lose()
                    self.assertEqual(without_asking(lines(c.connect()))[1:],
                                     self.refused("recipient-unavailable", "1", f"{TARGET}/a", address))
                elif end == "too many":
                    c.feed(iq(id="2", from_=f"{TARGET}/a", to=address))
                    self.assertEqual(c.ask(iq(id="3", from_=f"{TARGET}/a", to=address)),
                                     self.refused("resource-constraint", "3", f"{TARGET}/a", address))  # fmt: skip
                elif end == "same id":
                    self.assertEqual(c.ask(iq(id="1", from_=f"{TARGET}/a", to=address)),
                                     self.refused("conflict", "1", f"{TARGET}/a", address))
                else:
                    for bad in (iq(id="2", from_=f"{TARGET}/a", to=address, content=""),
                                iq(id="", from_=f"{TARGET}/a", to=address)):
                        (answer,) = c.feed(bad)
                        self.assertEqual((condition(answer), answer.get("to")), ("modify/bad-request", f"{TARGET}/a"))

    def test_malformed_request_is_refused(self) -> None:
        """A get/set without an id or with an empty one, with no or several payload elements (RFC 6120 §8.2.3), or an
        IQ of an unknown type: modify/bad-request; never an error in answer to an error or a result."""
        for resources in (("a",), ()):
            c = Conversation(*resources)
            for text in (iq(id=None), iq(id=""), iq(content=""), iq(content="text"), iq(content=QUERY * 2), iq(None),
                         iq("GET"), iq("")):
                with self.subTest(text):
                    answers = c.feed(text)
                    self.assertEqual([condition(answer) for answer in answers], ["modify/bad-request"])
                    self.assertEqual((answers[0].get("from"), answers[0].get("to")), (JID, USER))
            for text in (iq("result", None), iq("error", ""), iq("result", content=QUERY * 2), iq("error", content="")):
                self.assertEqual(c.ask(text), [])
            self.empty(c)

    def test_stanzas_in_jabber_client_are_taken_and_kept(self) -> None:
        """Taken like those in jabber:component:accept, sent on in the namespace they came in."""
        def client(text: str) -> str:
            return re.sub(r"^<(\w+)", r"<\1 xmlns='jabber:client'", text)

        c = Conversation()
        c.feed(client(presence(f"{TARGET}/a")))
        (request,) = c.feed(client(iq()))
        self.assertEqual((request.tag, line(request)), ("{jabber:client}iq", self.forwarded()[0]))
        (answer,) = c.feed(client(reply(request)))
        self.assertEqual((answer.tag, line(answer)), ("{jabber:client}iq", self.answered()[0]))
        (doubted,) = c.feed(client(iq()))
        self.assertIn(self.PROBE, c.ask(client(reply(doubted, stanza_error("service-unavailable"), "error"))))
        self.assertEqual(c.ask(client(message())), self.refused("feature-not-implemented", "m1", name="message"))
        c.feed(client(presence(f"{TARGET}/a", "unavailable")))
        self.assertEqual(c.ask(client(iq())), self.refused("service-unavailable"))

    def test_own_stanza_bounced_is_ignored(self) -> None:
        """The component's own stanza bounced (type='error', from the component): ignored, counted."""
        for relay in ("", "message presence iq"):
            c = Conversation("a", relay=relay)
            bounced = [xml(name, QUERY + stanza_error("service-unavailable"), type="error", id="1", from_=sender, to=to)
                       for name in ("iq", "message", "presence") for sender in (JID, f"{JID}/{USER}")
                       for to in (USER, f"{TARGET}/a", JID)]  # fmt: skip
            for text in bounced:
                with self.subTest(text):
                    self.assertEqual(c.ask(text), [])
            self.assertEqual(sum(c.proxy.dropped.values()), len(bounced))
            self.assertIn(f"{TARGET}/a", c.proxy.roster.resources)

    def test_stanza_without_from_or_to_another_is_dropped(self) -> None:
        """Dropped and counted (logged at most once a minute)."""
        for relay in ("", "message presence iq"):
            c = Conversation("a", relay=relay)
            wrong = ((None, JID), ("", JID), (USER, None), (USER, "other.localhost"), (USER, f"x.{JID}"),
                     (f"{TARGET}/b", "other.localhost/x"))  # fmt: skip
            kinds = list(itertools.product(("iq", "message", "presence"), ("get", "set", "subscribe", None, "odd"),
                                           wrong))
            for name, type_, (sender, to) in kinds:
                with self.subTest(name, type=type_, sender=sender, to=to):
                    self.assertEqual(c.ask(xml(name, QUERY, type=type_, id="1", from_=sender, to=to)), [])
            self.assertEqual(sum(c.proxy.dropped.values()), len(kinds))
            self.assertEqual(len(c.proxy.dropped), 2, "from nobody, to another")
            self.assertEqual(len([text for text in c.log if "dropped" in text]), len(c.proxy.dropped))
            self.assertEqual(list(c.proxy.roster.resources), [f"{TARGET}/a"])

    def test_message_is_not_implemented(self) -> None:
        """cancel/feature-not-implemented (not to type='error')."""
        c = Conversation("a")
        for sender in (USER, f"{TARGET}/a"):
            for type_ in (None, "chat", "normal", "headline", "groupchat"):
                self.assertEqual(c.ask(message(sender, type=type_)),
                                 self.refused("feature-not-implemented", "m1", sender, name="message"))
            self.assertEqual(c.ask(message(sender, type="error")), [])

    def test_message_is_relayed(self) -> None:
        """With relay = message: to a resource of the target from component/encoded-from; the target's to
        component/encoded-from goes to that user from the bare component (to another address: item-not-found, to the
        bare component: feature-not-implemented); no resource: service-unavailable, except to error, headline,
        groupchat."""
        for encoding in ("jid", "opaque"):
            c = Conversation("a", encoding=encoding, relay="message")
            content = "<body>b</body><x xmlns='urn:x'/>"
            for type_ in (None, "chat", "headline", "groupchat", "error"):
                with self.subTest(encoding, type=type_):
                    (there,) = c.feed(xml("message", content, type=type_, id="m", from_=USER, to=f"{JID}/x"))
                    address = there.get("from") or ""
                    self.assertEqual(line(there), f"message {type_ or '-'} m {address} > {TARGET}/a")
                    self.assertEqual(address == f"{JID}/{USER}", encoding == "jid")
                    self.assertEqual([local(child) for child in there], ["body", "x"])
                    (back,) = c.feed(xml("message", content, type=type_, id="n", from_=f"{TARGET}/a", to=address))
                    self.assertEqual(line(back), f"message {type_ or '-'} n {JID} > {USER}")
            for to, name in ((f"{JID}/@", "item-not-found"), (f"{JID}/.{'0' * 40}", "item-not-found"),
                             (JID, "feature-not-implemented"), (f"node@{JID}", "item-not-found")):
                with self.subTest(to):
                    self.assertEqual(c.ask(message(f"{TARGET}/a", to)),
                                     self.refused(name, "m1", f"{TARGET}/a", to, "message"))
                    self.assertEqual(c.ask(message(f"{TARGET}/a", to, "error")), [])
            c.go("a")
            for type_ in (None, "normal", "chat"):
                self.assertEqual(c.ask(message(type=type_)), self.refused("service-unavailable", "m1", name="message"))
            for type_ in ("error", "headline", "groupchat"):
                self.assertEqual(c.ask(message(type=type_)), [])

    def test_messages_of_one_requester_stay_with_one_resource_under_sticky(self) -> None:
        c = Conversation(*"abcdefgh", policy="sticky", relay="message presence")
        (request,) = c.feed(iq())
        receivers = {element.get("to") for element in c.feed(*(message() for _ in range(30)),
                                                             *(presence(USER) for _ in range(5)))}
        self.assertEqual(receivers, {request.get("to")})

    def test_presence_of_the_target(self) -> None:
        """Resources come and go; subscribe is granted, subscribed/unsubscribed/unsubscribe/error are handled and logged
        with what the operator must do; its probe gets available; unsubscribed and a bare unavailable make it forget the
        resources, an error from a full JID that one."""
        available, probe = f"presence - - {JID} > {TARGET}", self.PROBE
        table: list[tuple[str, list[str], str]] = [
            (presence(f"{TARGET}/c"), [], "abc"),
            (presence(f"{TARGET}/a"), [], "ab"),
            (presence(f"{TARGET}/a", "unavailable"), [], "b"),
            (presence(f"{TARGET}/c", "unavailable"), [], "ab"),
            (presence(TARGET), [], "ab"),
            (presence(TARGET, "subscribe"), [f"presence subscribed - {JID} > {TARGET}", available], "ab"),
            (presence(f"{TARGET}/a", "subscribe"), [f"presence subscribed - {JID} > {TARGET}", available], "ab"),
            (presence(TARGET, "subscribed"), [probe], "ab"),
            (presence(TARGET, "unsubscribe"), [], "ab"),
            (presence(TARGET, "probe"), [available], "ab"),
            (presence(f"{TARGET}/a", "probe"), [f"{available}/a"], "ab"),
            (presence(TARGET, "unsubscribed"), [], ""),
            (presence(TARGET, "unavailable"), [], ""),
            (xml("presence", stanza_error("service-unavailable"), type="error", from_=f"{TARGET}/a", to=JID), [], "b"),
            (xml("presence", stanza_error("item-not-found"), type="error", from_=TARGET, to=JID), [], "ab"),
            (presence(f"{TARGET}/a", "nonsense"), [], "ab"),
        ]  # fmt: skip
        for text, sent, resources in table:
            with self.subTest(text):
                c = Conversation("a", "b")
                self.assertEqual(c.ask(text), sent)
                self.assertEqual(sorted(c.proxy.roster.resources), [f"{TARGET}/{name}" for name in resources])
        c = Conversation()
        self.assertEqual(c.ask(presence(TARGET, "subscribed"), presence(TARGET, "subscribed")), [self.PROBE])
        c.ask(presence(TARGET, "unsubscribed"))
        self.assertEqual(c.ask(presence(TARGET, "subscribed")), [self.PROBE])
        for kind in ("unavailable", "unsubscribed"):
            c = Conversation("a", "b")
            c.feed(*(iq(id=str(number)) for number in range(9)))
            self.assertEqual(sorted(c.ask(presence(TARGET, kind))),
                             [self.refused("recipient-unavailable", str(n))[0] for n in range(9)])
            self.empty(c)

    def test_state_of_the_target_is_logged_once_with_what_to_do(self) -> None:
        refused = xml("presence", stanza_error("item-not-found"), type="error", from_=TARGET, to=JID)
        table = {
            "unsubscribed": ([presence(TARGET, "unsubscribed")] * 3, f"{TARGET}.*accept.*{JID}"),
            "offline": ([presence(TARGET, "unavailable")] * 3, f"{TARGET}.*log"),
            "both": ([presence(TARGET, "unsubscribed"), presence(TARGET, "unavailable")] * 3,
                     f"{TARGET}.*accept.*{JID}"),
            "error": ([refused] * 3, f"{TARGET}.*item-not-found.*target_address"),
            "a resource": ([presence(f"{TARGET}/a")] * 3, f"{TARGET}/a.*resources.*: 1"),
            "silence": ([], f"{TARGET}.*accept.*{JID}"),
        }  # fmt: skip
        for name, (stanzas, pattern) in table.items():
            with self.subTest(name):
                c = Conversation()
                for text in stanzas:
                    c.feed(text)
                c.wait(20.0)
                self.assertRegex("\n".join(c.log), pattern)
                self.assertEqual(len(c.log), 1)
        c = Conversation("a", "b")
        c.go("a", "b")
        self.assertEqual(len(c.log), 4, c.log)
        self.assertRegex(c.log[-1], f"{TARGET}/b.*no resource.*log")

    def test_known_resources_are_bounded(self) -> None:
        c = Conversation()
        with mock.patch.object(clientproxy, "MAX_RESOURCES", 5):
            c.come(*map(str, range(20)))
        self.assertEqual(len(c.proxy.roster.resources), 5)
        self.assertEqual(len([text for text in c.log if "5 resources of" in text and "others" in text]), 1)

    def test_resources_that_do_not_match_get_nothing(self) -> None:
        c = Conversation("worker-1", "phone", "worker-2", "Worker-3", resources="worker-*")
        receivers = {c.feed(iq(id=str(number)))[0].get("to") for number in range(40)}
        self.assertEqual(receivers, {f"{TARGET}/worker-1", f"{TARGET}/worker-2"})

    def test_presence_of_others(self) -> None:
        """subscribe gets unsubscribed, the rest is ignored; with relay = presence: available and unavailable are
        translated both ways, to the one resource that policy gives. Subscriptions are never relayed."""
        kinds = (None, "unavailable", "subscribed", "unsubscribe", "unsubscribed", "probe", "error", "subscribe")
        for relay in ("", "presence"):
            for encoding in ("jid", "opaque"):
                c = Conversation("a", relay=relay, encoding=encoding)
                address = c.proxy.codec.encode(USER)
                for kind in kinds:
                    with self.subTest(relay, kind=kind):
                        relayed = bool(relay) and kind in (None, "unavailable")
                        there = [f"presence {kind or '-'} - {address} > {TARGET}/a"] if relayed else []
                        there = [f"presence unsubscribed - {JID} > {USER}"] if kind == "subscribe" else there
                        self.assertEqual(c.ask(presence(USER, kind)), there)
                        if kind in (None, "unavailable"):
                            back = [f"presence {kind or '-'} - {JID} > {USER}"] if relayed else []
                            self.assertEqual(c.ask(presence(f"{TARGET}/a", kind, address)), back)
                            self.assertEqual(c.ask(presence(f"{TARGET}/a", kind, f"{JID}/@")), [])
                        self.assertEqual(list(c.proxy.roster.resources), [f"{TARGET}/a"])

    def test_stream_faults_end_the_stream_after_what_was_complete(self) -> None:
        """Comments, processing instructions, undefined entities: restricted-xml; not well-formed; no stanza."""
        for text, name in {"<!-- -->": "restricted-xml", "<?a b?>": "restricted-xml", "<iq>&a;</iq>": "restricted-xml",
                           "<iq></a>": "not-well-formed", "<a/>": "unsupported-stanza-type"}.items():  # fmt: skip
            with self.subTest(text):
                c = Conversation("a")
                forwarded, error = c.feed(iq(), text)
                self.assertEqual(line(forwarded), self.forwarded()[0])
                self.assertEqual(error[0].tag, f"{{urn:ietf:params:xml:ns:xmpp-streams}}{name}")
                c.lose()
                self.assertEqual(without_asking(lines(c.connect()))[1:], self.refused("recipient-unavailable"))

    # -- keys of the configuration

    def test_caps_are_answered(self) -> None:
        c = Conversation("a", max_pending="4", max_pending_per_user="2")
        answers = c.ask(*(iq(id=str(n), from_=f"u@d/{n}") for n in range(3)),
                        *(iq(id=str(n), from_=f"v@d/{n}") for n in range(2)), iq(id="5", from_="w@d"))
        refused = self.refused("resource-constraint", "2", "u@d/2") + self.refused("resource-constraint", "5", "w@d")
        self.assertEqual([text for text in answers if "error" in text], refused)
        self.assertEqual(len(answers), 6)

    def test_allow_matches_what_a_requester_cannot_choose(self) -> None:
        table = {
            "good.example": (["a@good.example/x", "good.example", "good.example/x"],
                             ["a@sub.good.example", "a@evil.example/good.example"]),
            "*.good.example": (["a@sub.good.example/r", "a@x.y.good.example"],
                               ["a@good.example", "x@bad.example/a.good.example"]),
            "*@good.example": (["evil@good.example/x"],
                               ["evil@bad.example/x@good.example", "good.example", "evil@bad.example"]),
            "a?@good.example": (["ab@good.example/r"], ["a@good.example", "abc@good.example", "a@@good.example"]),
            "a@good.example/*": (["a@good.example/r", "a@good.example/"],
                                 ["a@good.example", "a@good.example/r/s", "a@good.example/r@s"]),
            "A@Good.Example/Res": (["a@good.example/Res"], ["a@good.example/res"]),
            "a@one.example b@two.example": (["a@one.example/x", "b@two.example"], ["b@one.example", "a@two.example"]),
            "[ab].example": (["x@[ab].example"], ["x@a.example"]),
            "* a@b": (["anyone@anywhere/x"], []),
        }  # fmt: skip
        for globs, (good, bad) in table.items():
            c = Conversation("a", allow=globs, relay="message presence")
            for sender in good + bad:
                with self.subTest(globs, sender=sender):
                    wanted = self.forwarded(user=sender) if sender in good else self.refused("forbidden", to=sender)
                    self.assertEqual(c.ask(iq(from_=sender)), wanted)
                    relayed = [f"message chat m1 {JID}/{sender} > {TARGET}/a"]
                    self.assertEqual(c.ask(message(sender)),
                                     relayed if sender in good
                                     else self.refused("forbidden", "m1", sender, name="message"))
                    self.assertEqual(len(c.ask(presence(sender))), sender in good)

    def test_globs_match_as_globs_do(self) -> None:
        """Random ones against a plain translation, and at once also where that one would take for ever."""
        rand = random.Random(3)
        for _ in range(3000):
            glob = "".join(rand.choice("ab?*.\\+") for _ in range(rand.randrange(1, 8)))
            pattern = "".join({"*": "[^@/]*", "?": "[^@/]"}.get(char, re.escape(char)) for char in glob)
            domain = "".join(rand.choice("aab.\\+") for _ in range(rand.randrange(8)))
            allowed = clientproxy.allow_function((glob,))
            if allowed is not None:
                self.assertEqual(allowed(f"user@{domain}/r"), bool(re.fullmatch(pattern, domain)), (glob, domain))
        hostile = clientproxy.allow_function(("*a*a*a*a*a*a*a*a*a*a*b@d", "*a*a*a*a*a*a*a*a/*a*a*a*a*b"))
        assert hostile is not None
        self.assertFalse(hostile("a" * 1000 + "@d/" + "a" * 1000))

    def test_stanza_over_max_send_is_answered_instead(self) -> None:
        large, small = f"<a xmlns='urn:a'>{'b' * 2000}</a>", "<a xmlns='urn:a'/>"
        c = Conversation("a", max_send="1000", relay="message iq")
        self.assertEqual(c.ask(iq(content=large)), self.refused("policy-violation"))
        (request,) = c.feed(iq(to=f"{JID}/x"))
        self.assertEqual(c.ask(reply(request, large)), self.refused("policy-violation", from_=f"{JID}/x"))
        self.assertEqual(c.ask(xml("message", large, id="m1", from_=USER, to=JID)),
                         self.refused("policy-violation", "m1", name="message"))
        address = f"{JID}/{USER}"
        sent = c.ask(xml("message", large, id="m1", from_=f"{TARGET}/a", to=address))
        self.assertEqual([text.replace(f"{TARGET} ", f"{TARGET}/a ") for text in sent],
                         self.refused("policy-violation", "m1", f"{TARGET}/a", address, "message"))
        self.assertEqual(c.ask(xml("message", large, type="error", id="m1", from_=USER, to=JID)), [])
        self.assertEqual(c.ask(iq(from_=f"{TARGET}/a", to=address, content=large)),
                         self.refused("policy-violation", "q1", f"{TARGET}/a", address))
        (asked,) = c.feed(iq(from_=f"{TARGET}/a", to=address, content=small))
        self.assertEqual(c.ask(reply(asked, large)), self.refused("policy-violation", "q1", f"{TARGET}/a", address))
        self.empty(c)

    def test_error_over_max_send_is_not_sent_either(self) -> None:
        """The server would end the stream; an id is the requester's own choice."""
        c = Conversation("a", max_send="1000")
        self.assertEqual(c.ask(iq(id="x" * 2000)), [])
        self.assertEqual(c.ask(iq(id="<" * 400, content="")), [])
        self.assertEqual(len(c.ask(iq(id="x" * 500, content=""))), 1)
        self.empty(c)

    def test_reply_over_max_send_does_not_touch_a_request_of_the_target(self) -> None:
        """A user who is asked by the target knows the fresh id, and may use it for a request of his own."""
        c = Conversation("a", max_send="1000", relay="iq")
        (asked,) = c.feed(iq(from_=f"{TARGET}/a", to=f"{JID}/{USER}"))
        (request,) = c.feed(iq(id=asked.get("id")))
        self.assertEqual(c.ask(reply(request, f"<a xmlns='urn:a'>{'b' * 2000}</a>")),
                         self.refused("policy-violation", asked.get("id") or ""))
        self.assertEqual(c.ask(reply(asked)), [f"iq result q1 {JID}/{USER} > {TARGET}/a"])
        self.empty(c)

    def test_reply_over_max_send_to_the_target_does_not_touch_a_request_of_the_user(self) -> None:
        """Both chose the same id."""
        c = Conversation("a", max_send="1000", relay="iq")
        (request,) = c.feed(iq())
        (asked,) = c.feed(iq(from_=f"{TARGET}/a", to=f"{JID}/{USER}"))
        self.assertEqual(c.ask(reply(asked, f"<a xmlns='urn:a'>{'b' * 2000}</a>")),
                         self.refused("policy-violation", to=f"{TARGET}/a", from_=f"{JID}/{USER}"))  # fmt: skip
        self.assertEqual(c.ask(reply(request)), self.answered())
        self.empty(c)

    def test_opaque_requester_is_told_nothing_about(self) -> None:
        c = Conversation("a", encoding="opaque")
        (request,) = c.feed(iq())
        address = request.get("from") or ""
        self.assertTrue(address.startswith(f"{JID}/."))
        self.assertNotIn("user", address)
        self.assertEqual(c.feed(iq(id="q2"))[0].get("from"), address)
        self.assertEqual(c.ask(reply(request)), self.answered())
        again = Conversation("a", encoding="opaque", seed=99)
        self.assertEqual(again.feed(iq())[0].get("from"), address)

    def test_relayed_token_that_is_forgotten_is_not_found(self) -> None:
        with mock.patch.object(clientproxy, "MAX_TOKENS", 5):
            c = Conversation("a", encoding="opaque", relay="message iq")
            (request,) = c.feed(iq())
            (greeting,) = c.feed(message("other@d/r"))
            for number in range(50):
                c.feed(message(f"u{number}@d"))
            self.assertEqual(len(c.ask(message(f"{TARGET}/a", request.get("from") or ""))), 1)
            token = greeting.get("from") or ""
            self.assertEqual(c.ask(message(f"{TARGET}/a", token)),
                             self.refused("item-not-found", "m1", f"{TARGET}/a", token, "message"))
            self.assertEqual(c.ask(iq(from_=f"{TARGET}/a", to=token)),
                             self.refused("item-not-found", "q1", f"{TARGET}/a", token))

    def test_target_cannot_relay_to_a_component_of_this_daemon(self) -> None:
        c = Conversation("a", relay="message presence iq", domains=["second.localhost"])
        for user in ("second.localhost", "x@second.localhost/y", JID, f"u@{JID}"):
            to = f"{JID}/{user}"
            self.assertEqual(c.ask(iq(from_=f"{TARGET}/a", to=to)),
                             self.refused("item-not-found", "q1", f"{TARGET}/a", to))
            self.assertEqual(c.ask(message(f"{TARGET}/a", to)),
                             self.refused("item-not-found", "m1", f"{TARGET}/a", to, "message"))
            self.assertEqual(c.ask(presence(f"{TARGET}/a", to=to)), [])
        self.assertEqual(c.ask(message("u@second.localhost", type="error")), [])
        self.assertEqual(c.ask(message("u@second.localhost")),
                         self.refused("not-allowed", "m1", "u@second.localhost", name="message"))

    def test_draining_answers_new_requests_and_waits_for_the_open_ones(self) -> None:
        c = Conversation("a", relay="message iq presence")
        (request,) = c.feed(iq())
        c.proxy.draining = True
        self.assertEqual(c.ask(iq(id="q2")), self.refused("recipient-unavailable", "q2"))
        to = f"{JID}/{USER}"
        self.assertEqual(c.ask(iq(from_=f"{TARGET}/a", to=to)),
                         self.refused("recipient-unavailable", "q1", f"{TARGET}/a", to))
        self.assertEqual(c.ask(message()), self.refused("recipient-unavailable", "m1", name="message"))
        self.assertEqual(c.proxy.owed(), 1)
        self.assertEqual(c.ask(reply(request)), self.answered())
        c.proxy.draining = False
        c.feed(iq(id="q3"))
        c.proxy.answer_all("recipient-unavailable")
        self.assertEqual(lines(c.sent()), self.refused("recipient-unavailable", "q3"))
        self.empty(c)

    def test_answers_are_counted_by_their_time(self) -> None:
        c = Conversation("a")
        for seconds in (0.0, 0.004, 0.3, 29.0):
            (request,) = c.feed(iq())
            c.clock.now += seconds
            c.feed(reply(request))
        counts = dict(zip([*clientproxy.ANSWER_SECONDS, None], c.proxy.answer_counts))
        self.assertEqual({bound: count for bound, count in counts.items() if count}, {0.005: 2, 0.5: 1, 30.0: 1})
        self.assertAlmostEqual(c.proxy.answer_seconds, 29.304)
        c.feed(iq("get", None))
        self.assertEqual(c.proxy.outcomes["iq", "bad-request"], 1)

    def test_script_is_the_same_with_and_without_relay(self) -> None:
        """Without relay everything is as before; with it, requests of users are served just the same."""
        def script(relay: str) -> list[str]:
            c = Conversation(*"abc", relay=relay, policy="round-robin", timeout="5", max_pending_per_user="6")
            seen = []
            for step in range(30):
                users = (f"u{step % 4}@d/r", f"u{step % 3}@d/s")
                sent = c.feed(*(iq(("get", "set")[step % 2], f"i{step % 7}", user) for user in users))
                seen += lines(sent)
                for number, request in enumerate(sent):
                    if request.get("type") in ("get", "set") and (step + number) % 3:
                        seen += c.ask(reply(request))
                seen += c.go("a") if step % 5 == 4 else []
                if step % 5 == 1:
                    c.come("a")
                seen += c.ask(iq("result", "i1", f"{TARGET}/b", f"{JID}/u1@d/r"), iq("get", None),
                              iq("get", "loop", f"x@{JID}"))
                seen += lines(c.wait(2.0))
            c.lose()
            return seen + lines(c.connect())

        without = script("")
        self.assertGreater(len(without), 100)
        for relay in ("message", "presence", "iq", "message presence iq"):
            self.assertEqual(script(relay), without)


# --------------------------------------------------------------------------------------------- the configuration

COMPONENT = f"[{JID}]\ntarget_address = {TARGET}\nsecret = {SECRET}\n"


class TestConfiguration(unittest.TestCase):
    """The file, its mistakes, and what is written about it."""

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)
        self.file = self.directory / "test.conf"

    def read(self, text: str | bytes) -> clientproxy.Configuration:
        self.file.write_bytes(text.encode() if isinstance(text, str) else text)
        self.file.chmod(0o600)
        return clientproxy.ConfigurationReader(str(self.file)).read()

    def mistakes(self, text: str | bytes) -> list[str]:
        try:
            self.read(text)
        except clientproxy.ConfigurationError as error:
            self.assertTrue(all(line.startswith(f"{self.file}: ") and "\n" not in line for line in error.args),
                            error.args)
            return [str(line)[len(f"{self.file}: "):] for line in error.args]
        return []

    def test_least_file_has_the_defaults_of_the_contract(self) -> None:
        configuration = self.read(COMPONENT)
        self.assertEqual(configuration.components[JID], clientproxy.Component(
            jid=JID, target_address=TARGET, server=clientproxy.Server("localhost", 5347), tls=False, tls_ca="",
            secret=SECRET,
            encoding="jid", timeout=30, max_pending=10000, max_pending_per_user=1000, max_stanza=4194304,
            max_send=524288,
            policy="random", resources="*", allow=("*",), relay=frozenset(),
        ))  # fmt: skip
        self.assertEqual(configuration[1:], ("info", 5, None, ()))
        self.assertEqual(component(), configuration.components[JID])

    def test_every_key_is_read(self) -> None:
        (self.directory / "secret").write_text("from a file\n")
        with mock.patch.dict(os.environ, {"SECRETS": str(self.directory)}):
            configuration = self.read(
                "[clientproxy]\nlog_level = Debug\ndrain = 0\nmetrics = [::1]:9347\n"
                "[Proxy.Localhost]\nTarget_Address: Impl@LocalHost\nserver = unix:/run/x y\n"
                "secret_file = $SECRETS/secret\nencoding = opaque\ntimeout = 0.5\nmax_pending = 1\n"
                "max_pending_per_user = 2\nmax_stanza = 10000\nmax_send = 3\npolicy = Sticky\nresources = w-[ab]*\n"
                "allow = A.Example B@C.Example/R *\nrelay = iq message\n"
            )
        self.assertEqual(configuration.components[JID], clientproxy.Component(
            jid=JID, target_address=TARGET, server=clientproxy.Server("/run/x y", 0), tls=False, tls_ca="",
            secret="from a file",
            encoding="opaque", timeout=0.5, max_pending=1, max_pending_per_user=2, max_stanza=10000, max_send=3,
            policy="sticky",
            resources="w-[ab]*", allow=("a.example", "b@c.example/R", "*"), relay=frozenset(("iq", "message")),
        ))  # fmt: skip
        self.assertEqual(configuration[1:], ("debug", 0, clientproxy.Server("::1", 9347), ()))

    def test_mistake_in_a_key_is_named_with_what_would_be_right(self) -> None:
        number = ("", "0", "-1", "1.5", "1e3", "many", "nan", "inf", "\u0663", "0x10", "1_000", "9" * 30)
        seconds = ("", "-1", "many", "nan", "inf", "1e3", "86401", "86400.1", "1,5", "\u0663", "9" * 400)
        where = ("", "localhost", "localhost:", ":5347", "localhost:0", "localhost:65536", "localhost:-1",
                 "localhost:x", "[::1:5347", "::1]:5347",
                 "::1:5347", "[localhost]:5347", "[::1]", "[127.0.0.1]:5347", "local host:1", "a:b:1")  # fmt: skip
        table: dict[str, tuple[Iterable[str], str]] = {
            "target_address": (("", "d", "a@b/c", "a@b@c", "a b@c", "@b", "a@", "/", "a@b/"), "bare JID"),
            "server": (where, "host:port"), "tls": (("", "maybe", "1", "true"), "no, yes"),
            "encoding": (("", "base64"), "jid, opaque"), "timeout": ((*seconds, "0"), "86400"),
            "max_pending": (number, "at least 1"),
            "max_pending_per_user": (number, "at least 1"), "max_send": (number, "at least 1"),
            "max_stanza": ((*number, "9999"), "at least 10000"),
            "policy": (("", "rnd", "random sticky"), "random, round-robin, least-outstanding, sticky"),
            "resources": (("",), "empty"),
            "allow": (("",), "*"), "relay": (("mesage", "iq, message", "iq mesage"), "message, presence, iq"),
        }  # fmt: skip
        for key, (texts, right) in table.items():
            for text in texts:
                with self.subTest(key, text=text[:30]):
                    lines = [line for line in COMPONENT.splitlines() if not line.startswith(key)]
                    (mistake,) = self.mistakes("\n".join([*lines, f"{key} = {text}"]))
                    self.assertTrue(mistake.startswith(f"[{JID}] {key}: "), mistake)
                    self.assertIn(right, mistake)
        daemon = {"log_level": (("", "loud"), "debug, info, warning, error"), "drain": (seconds, "86400"),
                  "metrics": (where[1:], "host:port")}
        for key, (texts, right) in daemon.items():
            for text in texts:
                with self.subTest(key, text=text[:30]):
                    (mistake,) = self.mistakes(f"[clientproxy]\n{key} = {text}\n{COMPONENT}")
                    self.assertTrue(mistake.startswith(f"[clientproxy] {key}: "), mistake)
                    self.assertIn(right, mistake)

    def test_mistake_in_the_file_is_named(self) -> None:
        other = "[other.localhost]\ntarget_address = a@b\nsecret = s\n"
        table = {
            "": ["no component"], "[clientproxy]\ndrain = 1\n": ["no component"],
            COMPONENT + "tiemout = 5\n": [f"[{JID}] tiemout: "],
            f"[clientproxy]\npolicy = random\n{COMPONENT}": ["[clientproxy] policy: "],
            f"[DEFAULT]\nnonsense = 1\n{COMPONENT}": ["[DEFAULT] nonsense: "],
            f"[DEFAULT]\ndrain = 1\n{COMPONENT}": ["[DEFAULT] drain: "],
            f"[DEFAULT]\ntimeout = x\n{COMPONENT}{other}": ["[DEFAULT] timeout: "],
            COMPONENT.replace(JID, "proxy localhost"): ["[proxy localhost] "],
            COMPONENT.replace(JID, f"{JID}/res"): [f"[{JID}/res] "],
            COMPONENT.replace(JID, f"a@{JID}"): [f"[a@{JID}] "], COMPONENT.replace(JID, "a..b"): ["[a..b] "],
            COMPONENT + COMPONENT: [f"[{JID}] "], COMPONENT + COMPONENT.replace(JID,
                                                                                JID.upper()): [f"[{JID.upper()}] "],
            COMPONENT + "timeout = 1\nTimeout = 2\n": [f"[{JID}] timeout: "],
            COMPONENT.replace(JID, "ClientProxy"): ["[ClientProxy] "],
            f"secret = {SECRET}\n{COMPONENT}": ["line 1 "],
            COMPONENT + f"{SECRET}\n": ["not of the form key = value: line 4"], "[a.b\nx = 1\n": ["line 1 "],
            COMPONENT.replace(SECRET, ""): [f"[{JID}] secret: "],
            COMPONENT + "secret_file = /dev/null\n": [f"[{JID}] secret: "],
            COMPONENT.replace(f"secret = {SECRET}", "secret_file = /nonexistent/x"): [f"[{JID}] secret_file: "],
            COMPONENT.replace(f"secret = {SECRET}", "secret_file = /dev/null"): [f"[{JID}] secret_file: "],
            COMPONENT + "tls = yes\nserver = unix:/x\n": [f"[{JID}] tls: "],
            COMPONENT + "tls = yes\ntls_ca = /nonexistent\n": [f"[{JID}] tls_ca: "],
            COMPONENT + "tls = yes\ntls_ca = /dev/null\n": [f"[{JID}] tls_ca: "],
            COMPONENT.replace(TARGET, f"a@{JID}"): [f"[{JID}] target_address: "],
            COMPONENT.replace(TARGET, "a@other.localhost") + other: [f"[{JID}] target_address: "],
            COMPONENT + "server = unix:\n": [f"[{JID}] server: "],
            COMPONENT + f"server = unix:/{'x' * 107}\n": [f"[{JID}] server: "],
            COMPONENT + "timeout = 5\n  6\n": [f"[{JID}] timeout: "],
        }  # fmt: skip
        for text, starts in table.items():
            with self.subTest(text):
                mistakes = self.mistakes(text)
                self.assertEqual(len(mistakes), len(starts), mistakes)
                for mistake, start in zip(mistakes, starts):
                    self.assertTrue(mistake.startswith(start), mistake)
                    self.assertNotIn(SECRET, mistake)

    def test_every_mistake_is_on_its_own_line(self) -> None:
        daemon, one = "[clientproxy]\ndrain = x\nlog_levle = 1\n", "[one.a]\ntarget_address = a@b\nsecret = s\n"
        table = {
            f"{daemon}{one}policy = p\nserver = x\n{COMPONENT}[two.a]\ntimeout = y\n": {
                "[clientproxy] drain", "[clientproxy] log_levle", "[one.a] server", "[one.a] policy",
                "[two.a] target_address", "[two.a] timeout", "[two.a] secret",
            },
            f"{one}secret = s\npolicy = p\n{COMPONENT}timeout = 1\ntimeout = 2\n[one.a]\n": {
                "[one.a] secret", "[one.a] policy", f"[{JID}] timeout", "[one.a] stands",
            },
            f"stray = 1\n{COMPONENT}timeout = x\n": {"line 1 ", f"[{JID}] timeout"},
            f"{COMPONENT}junk\ntimeout = x\njunk\n": {"not of the form key = value: line 4, 6", f"[{JID}] timeout"},
        }  # fmt: skip
        for text, starts in table.items():
            with self.subTest(text):
                mistakes = self.mistakes(text)
                missing = {start for start in starts if not any(mistake.startswith(start) for mistake in mistakes)}
                self.assertEqual((missing, len(mistakes)), (set(), len(starts)), mistakes)

    def test_default_section_gives_defaults_to_components_only(self) -> None:
        configuration = self.read(
            "[DEFAULT]\nserver = xmpp.localhost:1\nsecret = shared\ntimeout = 7\n[clientproxy]\ndrain = 2\n"
            "[one.a]\ntarget_address = a@b\ntimeout = 8\n[two.a]\ntarget_address = a@b\nsecret = own\n"
        )
        one, two = configuration.components["one.a"], configuration.components["two.a"]
        self.assertEqual((one.secret, one.timeout, str(one.server)), ("shared", 8, "xmpp.localhost:1"))
        self.assertEqual((two.secret, two.timeout), ("own", 7))
        self.assertEqual(configuration.drain, 2)

    def test_own_secret_takes_the_place_of_the_other_kinds_default(self) -> None:
        path = self.directory / "secret"
        path.write_text("filed\r\n")
        for default, own, secret in (("secret = s", f"secret_file = {path}", "filed"),
                                     (f"secret_file = {path}", "secret = t", "t"),
                                     (f"secret_file = {path}", "", "filed"), ("secret = s", "", "s")):  # fmt: skip
            with self.subTest(default, own=own):
                configuration = self.read(f"[DEFAULT]\n{default}\n[{JID}]\ntarget_address = {TARGET}\n{own}\n")
                self.assertEqual(configuration.components[JID].secret, secret)

    def test_secret_file_holds_one_line(self) -> None:
        path = self.directory / "secret"
        text = COMPONENT.replace(f"secret = {SECRET}", f"secret_file = {path}")
        for content, good in ((b"s", True), (b"s\r\n", True), (b"s\nt\n", False), (b"\n", False), (b"", False),
                              (b"\xff", False),
                              (b"s" * 70_000, False)):  # fmt: skip
            with self.subTest(content[:9]):
                path.write_bytes(content)
                mistakes = self.mistakes(text)
                self.assertEqual(len(mistakes), not good)
                self.assertTrue(all(mistake.startswith(f"[{JID}] secret_file: ") for mistake in mistakes))

    def test_lists_may_go_on_in_the_next_line(self) -> None:
        (one,) = self.read(f"{COMPONENT}allow = a.example\n  b.example\nrelay = iq\n  message\n").components.values()
        self.assertEqual((one.allow, one.relay), (("a.example", "b.example"), {"iq", "message"}))

    def test_text_is_taken_as_it_stands(self) -> None:
        for secret in ("%(x)s", "a # b", "a;b", "a = b: c", "\u00fc", '"q"', "%"):
            with self.subTest(secret):
                self.assertEqual(self.read(COMPONENT.replace(f"= {SECRET}", f"=  {secret}  ")).components[JID].secret,
                                 secret)

    def test_unreadable_file_is_a_mistake(self) -> None:
        for path in (self.directory / "missing", self.directory):
            with self.subTest(path), self.assertRaises(clientproxy.ConfigurationError) as caught:
                clientproxy.ConfigurationReader(str(path)).read()
            self.assertIn(str(path), caught.exception.args[0])
        self.assertRegex(self.mistakes(COMPONENT.encode() + b"# \xff\n")[0], "not UTF-8")
        self.assertEqual(self.mistakes(b"\xef\xbb\xbf" + COMPONENT.encode()), [])

    def test_what_is_odd_but_possible_is_a_warning(self) -> None:
        table = {"server = xmpp.example:5347": "server: ", "tls_ca = /dev/null": "tls_ca: ",
                 "server = 192.0.2.1:5347": "server: ", "server = [2001:db8::1]:5347": "server: "}
        for key, start in table.items():
            (warning,) = self.read(f"{COMPONENT}{key}\n").warnings
            self.assertIn(f"[{JID}] {start}", warning)
        for key in ("server = 127.0.0.1:1", "server = 127.1.2.3:1", "server = [::1]:1", "server = [0:0::0:1]:1",
                    "server = Localhost:1", "server = unix:/x", "server = xmpp.example:1\ntls = yes"):
            self.assertEqual(self.read(f"{COMPONENT}{key}\n").warnings, ())
        self.file.chmod(0o644)
        (warning,) = clientproxy.ConfigurationReader(str(self.file)).read().warnings
        self.assertIn("chmod", warning)

    def test_what_would_run_is_told_without_secrets(self) -> None:
        text = str(self.read(f"{COMPONENT}policy = sticky\nrelay = iq\n"))
        for word in (JID, TARGET, "localhost:5347", "sticky", "relay iq", "metrics off"):
            self.assertIn(word, text)
        for server in ("[::1]:5347", "unix:/run/x", "a.example:1"):
            self.assertIn(server, str(self.read(f"{COMPONENT}server = {server}\n")))
        self.assertNotIn(SECRET, text)

    def test_sample_uncommented_gives_the_defaults_and_names_every_key(self) -> None:
        path = CLIENTPROXY.with_name("clientproxy.conf.sample")
        if not path.exists():
            self.skipTest(f"no {path}")
        text = path.read_text()
        plain = self.read(text)
        uncommented = re.sub(r"(?m)^# ?(\w+) =", r"\1 =", text)
        keys = {key.name: key for key in (*clientproxy.COMPONENT_KEYS, *clientproxy.DAEMON_KEYS)}
        given = dict(re.findall(r"(?m)^(\w+) = ?(.*)$", uncommented))
        self.assertEqual(set(given), set(keys))
        for name, key in keys.items():
            if key.default is not None and name != "secret":
                self.assertEqual(given[name], key.default, name)
        self.assertEqual(self.read(uncommented), plain)
        (one,) = plain.components.values()
        self.assertEqual(one, component(one.jid, target_address=one.target_address, secret=one.secret))

    def test_readme_explains_every_key(self) -> None:
        path = CLIENTPROXY.with_name("README.md")
        if not path.exists():
            self.skipTest(f"no {path}")
        rows = [row for row in path.read_text().splitlines() if row.startswith("| `")]
        for key in (*clientproxy.COMPONENT_KEYS, *clientproxy.DAEMON_KEYS):
            with self.subTest(key.name):
                (row,) = (row for row in rows if f"`{key.name}`" in row.split("|")[1])
                default = "required" if key.default is None else key.default
                if default and key.name != "secret":
                    self.assertIn(default, row.split("|")[2])


# --------------------------------------------------------------------------------------------- log, notify, output


class TestLog(unittest.TestCase):
    """One line an event, whatever is in it."""

    @staticmethod
    def record(message: str, *arguments: object, level: int = logging.WARNING) -> logging.LogRecord:
        return logging.LogRecord("clientproxy", level, "", 0, message, arguments, None)

    def test_line_has_its_level_and_in_the_journal_its_priority(self) -> None:
        for level, name, priority in ((10, "debug", 7), (20, "info", 6), (30, "warning", 4), (40, "error", 3),
                                      (50, "critical", 2)):
            with self.subTest(name):
                record = self.record("a %s", "b", level=level)
                self.assertRegex(clientproxy.LineFormatter(False).format(record),
                                 rf"\A\d{{4}}-\d\d-\d\dT[\d:]+[+-]\d{{4}} {name}: a b\Z")
                self.assertEqual(clientproxy.LineFormatter(True).format(record), f"<{priority}>a b")

    def test_nobody_can_write_a_line_of_his_own(self) -> None:
        evil = "a\nb\rc\x1b[31m\x00\x85\u2028\u202e\ud800\tü"
        for journal in (True, False):
            text = clientproxy.LineFormatter(journal).format(self.record("%s", evil))
            self.assertEqual(len(text.splitlines()), 1)
            self.assertTrue(text.isprintable(), ascii(text))
            self.assertIn("ü", text)
            text.encode()

    def test_traceback_stays_in_one_line(self) -> None:
        try:
            raise ValueError("a\nb")
        except ValueError:
            record = logging.LogRecord("clientproxy", 40, "", 0, "wrong", (), sys.exc_info())
        self.assertRegex(clientproxy.LineFormatter(True).format(record), r"\A<3>wrong: Traceback.*ValueError: a.*b\Z")

    def test_lines_of_one_cause_are_limited_and_counted(self) -> None:
        limiter = clientproxy.LogLimiter()
        passed = [limiter.filter(self.record("%s: dropped %d", "one", number)) for number in range(50)]
        self.assertEqual(passed, [True] * 10 + [False] * 40)
        self.assertTrue(limiter.filter(self.record("%s: dropped %d", "two", 1)))
        self.assertTrue(limiter.filter(self.record("%s: other", "one")))
        self.assertTrue(all(limiter.filter(self.record("%s: traced", "one", level=logging.DEBUG)) for _ in range(50)))
        with self.assertLogs("clientproxy", logging.WARNING) as caught:
            limiter.summarise(time.monotonic() + 2.0)
        self.assertEqual(len(caught.output), 1)
        self.assertRegex(caught.output[0], "40 more .*: one: ")
        self.assertTrue(limiter.filter(self.record("%s: dropped %d", "one", 51)))


class TestNotify(unittest.TestCase):
    """sd_notify(3) without systemd."""

    def test_message_reaches_the_socket(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            for path, name in ((f"{directory}/notify", f"{directory}/notify"),
                               (f"@clientproxy-test-{os.getpid()}", f"\0clientproxy-test-{os.getpid()}")):
                with self.subTest(path), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
                    receiver.bind(name)
                    with mock.patch.dict(os.environ, {"NOTIFY_SOCKET": path}):
                        clientproxy.notify("READY=1\nSTATUS=ü")
                    receiver.settimeout(PATIENCE)
                    self.assertEqual(receiver.recv(1000), "READY=1\nSTATUS=ü".encode())

    def test_nobody_listens_nothing_happens(self) -> None:
        for path in ("", "/nonexistent/notify"):
            with mock.patch.dict(os.environ, {"NOTIFY_SOCKET": path}):
                clientproxy.notify("READY=1")

    def test_watchdog_is_fed_twice_in_its_time(self) -> None:
        pid = str(os.getpid())
        table = {("3000000", None): 1.5, ("3000000", pid): 1.5, ("3000000", "1"): 0.0, (None, None): 0.0,
                 ("x", pid): 0.0, ("", None): 0.0}
        for (microseconds, whose), interval in table.items():
            environment = {"WATCHDOG_USEC": microseconds, "WATCHDOG_PID": whose}
            with self.subTest(environment), mock.patch.dict(os.environ,
                                                            {key: value for key,
                                                             value in environment.items() if value is not None}):
                self.assertEqual(clientproxy.Daemon._watchdog_interval(), interval)


class TestOutbox(unittest.TestCase):
    """What waits to be sent, and what of it must not be lost."""

    ANSWERS = [iq("result", "1", JID, USER), iq("error", "2", JID, USER, QUERY + stanza_error("conflict")),
               message(JID, USER), message(JID, TARGET, "error")]
    OTHERS = [iq("get", "3", f"{JID}/{USER}", f"{TARGET}/a"), iq("set", "4", JID, USER), presence(JID, to=USER), " "]

    def test_bytes_are_sent_in_order_and_the_rest_kept(self) -> None:
        data = [f"<iq id='{number}'/>".encode() * (number % 3 + 1) for number in range(10)]
        whole = b"".join(data)
        for at_a_time in (1, 7, 1000):
            outbox, sock = clientproxy.Outbox(), FakeSocket(0, at_a_time)
            for chunk in data:
                outbox.push(chunk)
            sent = 0
            for room in itertools.cycle((0, 1, 5, 30)):
                sock.room = room
                sent += outbox.send_to(sock)
                self.assertEqual((sock.taken, outbox.size), (whole[:sent], len(whole) - sent))
                if not outbox.size:
                    break
            self.assertEqual((sock.taken, outbox.answers()), (whole, []))

    def test_unsent_answers_are_those_that_did_not_go_out_whole(self) -> None:
        stanzas = [self.ANSWERS[0], *self.OTHERS, *self.ANSWERS[1:], "</stream:stream>"]
        data = "".join(stanzas).encode()
        for got in range(len(data) + 1):
            kept = clientproxy.unsent_answers(data, got)
            ends = itertools.accumulate(len(stanza.encode()) for stanza in stanzas)
            wanted = [stanza for stanza, end in zip(stanzas, ends) if end > got and stanza in self.ANSWERS]
            self.assertEqual(lines(elements_of(b"".join(kept))), lines(elements_of("".join(wanted))), got)

    def test_unsent_answers_keep_their_meaning(self) -> None:
        for text in SHADOWS:
            stanza = re.sub(r"^<([\w:]+)", r"<\1 type='result'", text)
            (kept,) = clientproxy.unsent_answers((presence(JID) + stanza).encode(), 5)
            self.assertEqual(canonical(elements_of(kept)[0]), canonical(elements_of(stanza)[0]))
        deep = iq("result", content=nested(1999)).encode()
        self.assertEqual(len(clientproxy.unsent_answers(deep, 1)), 1)

    def test_outbox_gives_the_unsent_answers_of_all_its_chunks(self) -> None:
        outbox = clientproxy.Outbox()
        for text in self.ANSWERS + self.OTHERS:
            outbox.push(text.encode())
        outbox.send_to(FakeSocket(len(self.ANSWERS[0].encode()) + 3))
        self.assertEqual(lines(elements_of(b"".join(outbox.answers()))), lines(elements_of("".join(self.ANSWERS[1:]))))


# ------------------------------------------------------------------------------------- the whole proxy and a model


class Model:
    """Users, the target's resources and a server that do as they please; and what must hold whatever they do.

    Every request has exactly one answer; an answer has the payload of the one who was asked, and only
    goes to one who has asked, from the address that was asked; requests go to available resources.
    """

    def __init__(self, seed: int) -> None:
        self.rand = random.Random(seed)
        self.opaque = self.rand.random() < 0.3
        self.c = Conversation(
            seed=seed, timeout="20", max_pending="25", max_pending_per_user="6", max_send="2000",
            encoding="opaque" if self.opaque else "jid", policy=self.rand.choice(list(clientproxy.POLICIES)),
            relay=self.rand.choice(["", "iq", "message presence iq"]),
        )  # fmt: skip
        self.users = [f"{name}@d.example/{resource}" for name in "uvw" for resource in ("r", "s@t")]
        self.online: set[str] = set()  # the target's resources, as the server knows them
        self.known: set[str] = set()  # those that the daemon was told of on this stream
        self.unanswered: collections.Counter[tuple[str, str, str]] = collections.Counter()  # requester, asked, id
        # address and id of a request that was sent on -> who was asked, and its requester, the address he asked, his id
        self.carried: dict[tuple[str, str], tuple[str, str, str, str]] = {}
        self.old: list[tuple[str, str, str]] = []  # who was asked, address, id, of requests that are answered
        self.addresses: dict[str, str] = {}  # encoded-from -> user
        self.genuine: dict[str, tuple[str, str, str]] = {}  # mark of a payload -> the request that it answers
        self.marks = itertools.count()
        self.requests: dict[str, tuple[str, str, str]] = {}  # mark of a request
        self.connected = True
        self.unread = b""  # what the daemon has written and the server not read
        self.asked = self.answered = 0

    # -- what the daemon sends

    def read(self, data: bytes) -> None:
        for element in elements_of(data):
            kind, to, from_, id_ = (element.get(key, "") for key in ("type", "to", "from", "id"))
            if local(element) == "presence" and kind == "probe":
                self.feed(*(presence(jid) for jid in sorted(self.online)))
                self.known |= self.online
            elif local(element) == "iq" and kind in ("get", "set"):
                self.take_request(element, to, from_, id_)
            elif local(element) == "iq":
                self.take_answer(element, to, from_, id_)
            elif local(element) == "message":
                self.take_message(element, to, from_)

    def take_request(self, element: Element, to: str, from_: str, id_: str) -> None:
        request = self.requests[element[0].get("mark", "")]
        requester, asked, original = request
        assert (from_, id_) not in self.carried, f"two open requests are {from_} {id_}"
        if from_ == JID:
            assert requester in self.known and to == self.addresses.get(asked), f"{to} is asked in place of {asked}"
            assert original != id_, "the id is not fresh"
        else:
            assert to in self.known, f"{to} is asked, which is not available"
            assert original == id_ and self.addresses.setdefault(from_, requester) == requester, from_
            assert self.opaque or from_ == f"{JID}/{requester}", from_
        self.carried[from_, id_] = (to, *request)

    def take_answer(self, element: Element, to: str, from_: str, id_: str) -> None:
        request = (to, from_, id_)
        assert self.unanswered[request] > 0, f"{to} did not ask {from_} for {id_}, or was answered"
        self.unanswered[request] -= 1
        self.answered += 1
        mark = element[0].get("mark") if len(element) else None
        if mark is not None or element.get("type") == "result":
            assert self.genuine.get(mark or "") == request, f"{request} got the answer of another: {mark}"
        for key, (asked, *rest) in list(self.carried.items()):
            if tuple(rest) == request and not self.unanswered[request]:  # else the same was asked again, and refused
                del self.carried[key]
                self.old.append((asked, *key))

    def take_message(self, element: Element, to: str, from_: str) -> None:
        if element.get("type") != "error":
            assert "message" in self.c.component.relay, "a message is relayed"
            assert to.startswith(f"{TARGET}/") if from_ != JID else to in self.users, f"a message to {to}"

    # -- what the others do

    def feed(self, *stanzas: str) -> None:
        if not self.connected:
            return
        c = self.c
        data = "".join(stanzas).encode()
        c.proxy.now = c.clock.now
        cut = self.rand.randrange(len(data) + 1) if self.rand.random() < 0.2 else 0
        for chunk in (data[:cut], data[cut:]):
            if chunk:
                c.stream.receive(chunk, c.clock.now)
                self.unread += c.stream.data_to_send()
        if self.rand.random() < 0.8:
            self.read_all()

    def read_all(self) -> None:
        data, self.unread = self.unread, b""
        if data:
            self.read(data)

    def payload(self, request: tuple[str, str, str], marks: dict[str, tuple[str, str, str]],
                large: bool = False) -> str:
        mark = f"m{next(self.marks)}"
        marks[mark] = request
        return f"<x xmlns='urn:x' mark='{mark}'>{'large' * 500 if large else ''}</x>"

    def ask(self) -> None:
        requester, to, id_ = self.rand.choice(self.users), self.rand.choice([JID,
                                                                             f"{JID}/y"]), f"i{self.rand.randrange(5)}"
        kind = self.rand.choice(["get", "set"])
        if not self.connected:
            return
        request = (requester, to, id_)
        self.unanswered[request] += 1
        self.asked += 1
        content = self.payload(request, self.requests, self.rand.random() < 0.05)
        self.feed(iq(kind, id_, requester, to, content * self.rand.choice([1] * 20 + [2])))

    def ask_of_target(self) -> None:
        if not self.connected or not self.addresses:
            return
        asker = self.rand.choice([f"{TARGET}/{name}" for name in "abcd"])
        request = (asker, self.rand.choice(list(self.addresses)), f"i{self.rand.randrange(5)}")
        self.unanswered[request] += 1
        self.asked += 1
        self.feed(iq("get", request[2], *request[:2], self.payload(request, self.requests)))

    def answer(self) -> None:
        self.read_all()
        if not self.carried or not self.connected:
            return
        (address, id_), (asked, *rest) = self.rand.choice(list(self.carried.items()))
        request = (rest[0], rest[1], rest[2])
        large = self.rand.random() < 0.05
        content = self.payload(request, self.genuine, large)
        mark = f"m{next(self.marks) - 1}"
        kind = self.rand.choice(["result", "error"])
        before = self.unanswered[request]
        error = stanza_error(self.rand.choice(["item-not-found", "service-unavailable"]))
        self.feed(iq(kind, id_, asked, address, content + (error if kind == "error" else "")))
        self.read_all()
        assert self.unanswered[request] == before - 1, f"the answer {mark} to {request} did not arrive"

    def spoof(self) -> None:
        self.read_all()
        everyone = [*self.users, TARGET, JID, *(f"{TARGET}/{name}" for name in "abcd"), "evil@bad.example/x"]
        for _ in range(self.rand.randrange(4)):
            sender = self.rand.choice(everyone)
            address, id_ = self.rand.choice([*self.carried, (JID, "i1"),
                                             (f"{JID}/{self.rand.choice(self.users)}", "i2")])
            asked = self.carried.get((address, id_), ("",))[0]
            if self.old and self.rand.random() < 0.5:  # a second or a late reply, of the right one
                sender, address, id_ = self.rand.choice(self.old)
                asked = self.carried.get((address, id_), ("",))[0]
            if sender != asked:
                self.feed(iq(self.rand.choice(["result", "error"]), id_, sender, address,
                             self.payload(("", "", ""), {})))

    def chat(self) -> None:
        address = self.rand.choice([*self.addresses, JID, f"{JID}/@"])
        self.feed(self.rand.choice([
            message(self.rand.choice(self.users)), message(f"{TARGET}/a", address),
            presence(self.rand.choice(self.users)),
            presence(f"{TARGET}/a", self.rand.choice([None, "unavailable"]), address) if address != JID else "",
        ]))  # fmt: skip

    def come(self) -> None:
        jid = f"{TARGET}/{self.rand.choice('abcd')}"
        self.online.add(jid)
        if self.connected:
            self.known.add(jid)
            self.feed(presence(jid))

    def go(self) -> None:
        self.read_all()
        if self.rand.random() < 0.2:
            self.online.clear()
            self.known.clear()
            self.feed(presence(TARGET, self.rand.choice(["unavailable", "unsubscribed"])))
        elif self.online:
            jid = self.rand.choice(sorted(self.online))
            self.online.discard(jid)
            self.known.discard(jid)
            self.feed(presence(jid, "unavailable"))
        self.read_all()

    def wait(self, seconds: float = 0.0) -> None:
        self.read_all()
        c = self.c
        end = c.clock.now + (seconds or self.rand.choice([0.1, 1.0, 5.0, 30.0]))
        while True:
            due = min(c.proxy.next_deadline(), c.stream.next_deadline() if self.connected else clientproxy.NEVER)
            if due > end:
                break
            c.clock.now = max(c.clock.now, due)
            c.proxy.tick(c.clock.now)
            if self.connected:
                c.stream.receive(b" ", c.clock.now)
                c.stream.tick(c.clock.now)
                self.unread += c.stream.data_to_send()
                self.read_all()
        c.clock.now = end

    def lose(self) -> None:
        """The connection breaks at any byte of what the server has not read."""
        if not self.connected:
            return
        got = self.rand.randrange(len(self.unread) + 1)
        outbox = clientproxy.Outbox()
        if self.unread:
            outbox.push(self.unread)
            outbox.send_to(FakeSocket(got))
        self.connected = False
        self.c.proxy.lost(self.c.clock.now, outbox.answers())
        self.read(self.unread[:got])
        self.old += [(asked, *key) for key, (asked, *_) in self.carried.items()]
        self.unread = b""
        self.carried.clear()
        self.known.clear()

    def connect(self) -> None:
        if self.connected:
            return
        self.connected = True
        c = self.c
        c.stream = clientproxy.ComponentStream(JID, SECRET, 1 << 20, 2000, c.proxy)
        c.stream.open(c.clock.now)
        c.stream.data_to_send()
        c.proxy.now = c.clock.now
        c.stream.receive(HEADER.encode(), c.clock.now)
        c.stream.data_to_send()
        self.feed("<handshake/>")

    def run(self, steps: int) -> None:
        """Do this much at random, then let everything come to its end and look at what is left."""
        do = [self.ask] * 8 + [self.answer] * 6 + [self.spoof, self.come, self.wait, self.chat] * 2 + [self.go,
                                                                                                       self.ask_of_target]
        for _ in range(steps):
            self.rand.choice(do if self.rand.random() < 0.97 else [self.lose, self.connect, self.connect])()
        drained = self.rand.random() < 0.5
        self.c.proxy.draining = drained
        for _ in range(20):
            self.rand.choice(do)()
        self.connect()
        if drained:
            self.read_all()
            self.c.proxy.answer_all("recipient-unavailable")
            self.unread += self.c.stream.data_to_send()
        self.wait(100.0)
        self.read_all()
        left = {request: count for request, count in self.unanswered.items() if count}
        assert not left, f"{left} were never answered"
        proxy = self.c.proxy
        tables = (len(proxy.requests), proxy.owed(), proxy.requests._users, proxy.requests._of_target,
                  proxy.requests._long_ids)
        assert tables == (0, 0, {}, set(), 0), f"the tables hold {tables}"
        assert not any(r.open for r in proxy.roster.resources.values())
        assert self.c.stream.state is State.READY, self.c.stream.failure


class TestModel(unittest.TestCase):
    """The whole proxy at random against a simple model."""

    def test_every_request_has_exactly_one_answer(self) -> None:
        asked = 0
        for round_ in range(ROUNDS or 250):
            seed = int(os.environ.get("CLIENTPROXY_SEED") or random.randrange(1 << 32))
            model = Model(seed)
            try:
                model.run(300)
            except Exception as error:
                raise AssertionError(f"round {round_}, CLIENTPROXY_SEED={seed}: {error!r}") from error
            self.assertEqual(model.asked, model.answered)
            asked += model.asked
        self.assertGreater(asked, 10)


# ------------------------------------------------------------------------------------------ the daemon as a process


class ServerStream:
    """The server's end of one connection: what the daemon sends, and what it is to get."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(PATIENCE)
        self.reader = Reader()
        self.waiting: collections.deque[Element] = collections.deque()
        self.ended = False  # the daemon has closed the connection

    def send(self, *texts: str) -> None:
        self.sock.sendall("".join(texts).encode())

    def read(self) -> None:
        """Read once."""
        try:
            data = self.sock.recv(65536)
        except ConnectionResetError:
            data = b""
        self.ended = not data
        self.waiting += self.reader.feed(data) if data else []

    def header(self) -> Element:
        """The daemon's stream header."""
        while self.reader.root is None:
            self.read()
            assert not self.ended, "the daemon closed the connection before its stream header"
        return self.reader.root

    def next(self) -> Element | None:
        """The daemon's next stanza, None: the connection has ended."""
        while not self.waiting and not self.ended:
            self.read()
        return self.waiting.popleft() if self.waiting else None

    def expect(self, pattern: str) -> Element:
        """The next stanza whose line() matches a glob; those before it are passed over."""
        seen: list[str] = []
        try:
            for element in iter(self.next, None):
                if fnmatch.fnmatchcase(line(element), pattern):
                    return element
                seen.append(line(element))
        except TimeoutError:
            raise AssertionError(f"no {pattern!r} in {PATIENCE:g} s, but {seen}") from None
        raise AssertionError(f"the daemon closed the connection without {pattern!r}, after {seen}")

    def rest(self) -> list[str]:
        """What the daemon sends until it closes the connection."""
        return lines(iter(self.next, None))

    def login(self, *resources: str, secret: str = SECRET) -> ServerStream:
        """Let the daemon in, and tell it that these resources of the target are available."""
        self.jid = self.header().get("to", "")
        self.send(HEADER)
        handshake = self.expect("handshake *")
        assert handshake.text == hashlib.sha1(f"s1{secret}".encode()).hexdigest(), handshake.text
        self.send("<handshake/>", *(presence(f"{TARGET}/{name}", to=self.jid) for name in resources))
        return self

    def serve(self, id: str = "q1") -> str:
        """A round trip of a request; returns the requester's answer as a line."""
        self.send(iq(id=id, to=self.jid))
        request = self.expect(f"iq * {id} *")
        if request.get("type") != "get":
            return line(request)
        self.send(reply(request))
        return line(self.expect(f"iq * {id} *"))

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Close without a word; what is under way is lost."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()


class ScriptedServer:
    """A XEP-0114 server on loopback that does what the test says; `keys` are a component's that connects to it."""

    def __init__(self, path: str = "", host: str = "127.0.0.1", tls: ssl.SSLContext | None = None,
                 receive_buffer: int = 0) -> None:  # fmt: skip
        self.tls = tls
        family = socket.AF_UNIX if path else socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.socket(family)
        if receive_buffer:
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.listener.bind(path or (host, 0))
        except OSError:
            self.listener.close()
            raise
        self.listener.listen(128)
        self.listener.settimeout(PATIENCE)
        self.streams: list[ServerStream] = []
        host = f"[{host}]" if ":" in host else host
        self.address = f"unix:{path}" if path else f"{host}:{self.listener.getsockname()[1]}"

    @property
    def keys(self) -> dict[str, object]:
        return {"server": self.address, "target_address": TARGET, "secret": SECRET}

    def accept(self) -> ServerStream:
        """The daemon's next connection."""
        sock, _ = self.listener.accept()
        if self.tls is not None:
            sock.settimeout(PATIENCE)
            sock = self.tls.wrap_socket(sock, server_side=True)
        self.streams.append(ServerStream(sock))
        return self.streams[-1]

    def close(self) -> None:
        for sock in (self.listener, *(stream.sock for stream in self.streams)):
            sock.close()


class Daemon:
    """The daemon as a process, with a configuration made from {section: {key: value}}.

    `changes` are assignments in the module, for times that nobody wants to wait for.
    """

    def __init__(self, config: Config, *arguments: str, changes: str = "",
                 environment: dict[str, str] | None = None) -> None:
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="clientproxy-test-"))
        self.file, self.output = self.directory / "clientproxy.conf", self.directory / "log"
        self.configure(config)
        code = f"import sys, clientproxy\n{changes}\nsys.exit(clientproxy.main(sys.argv[1:]))"
        program = ["-c", code] if changes else [str(CLIENTPROXY)]
        with open(self.output, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program, "-c", str(self.file), *arguments], stdout=log, stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=CLIENTPROXY.parent, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})},
            )  # fmt: skip

    def configure(self, config: Config) -> None:
        """Write the configuration; a running daemon reads it at SIGHUP."""
        sections = (f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items()) for name,
                    keys in config.items())
        self.file.write_text("\n".join(sections))
        self.file.chmod(0o600)

    def log(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_log(self, pattern: str, count: int = 1) -> None:
        until(lambda: len(re.findall(pattern, self.log())) >= count, what=f"{pattern!r} in the log")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def exit_status(self) -> int:
        return self.process.wait(PATIENCE)

    def memory(self) -> int:
        """Resident bytes."""
        return int(pathlib.Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


# A reconnect takes 20 ms at most, whatever the rules say; those are tested with TestPauses.
AT_ONCE = "clientproxy.random.uniform = lambda low, high: 0.02"


class TestDaemon(unittest.TestCase):
    """The real process against servers that behave, and that do not."""

    def server(self, **options: Any) -> ScriptedServer:
        server = ScriptedServer(**options)
        self.addCleanup(server.close)
        return server

    def daemon(self, config: Config, *arguments: str, changes: str = "", **environment: str) -> Daemon:
        daemon = Daemon(config, *arguments, changes=changes, environment=environment)
        self.addCleanup(daemon.close)
        self.addCleanup(lambda: self.assertNotIn("Traceback", daemon.log()))
        return daemon

    def directory(self) -> pathlib.Path:
        directory = tempfile.mkdtemp(prefix="clientproxy-test-")
        self.addCleanup(shutil.rmtree, directory, ignore_errors=True)
        return pathlib.Path(directory)

    SERVED = f"iq result q1 {JID} > {USER}"

    # -- command line and configuration

    def test_command_line_and_configuration_decide_the_exit_status(self) -> None:
        good = {JID: {"target_address": TARGET, "secret": SECRET, "server": "127.0.0.1:9"}}
        bad = {JID: {"target_address": "x", "secret": SECRET, "timeout": "0"}, "clientproxy": {"drain": "x"}}
        missing = ("-c", "/nonexistent/clientproxy.conf")
        for config, arguments, status, count in ((good, ("--check",), 0, 0), (bad, ("--check",), 78, 3),
                                                 (bad, (), 78, 3), (good, missing, 78, 1),
                                                 (good, ("--nonsense",), 2, 0), (good, ("--version",), 0, 0),
                                                 (good, ("-h",), 0, 0)):  # fmt: skip
            with self.subTest(arguments, status=status):
                daemon = self.daemon(config, *arguments)
                self.assertEqual(daemon.exit_status(), status)
                path = missing[1] if arguments is missing else str(daemon.file)
                self.assertEqual(len([text for text in daemon.log().splitlines() if f"{path}: " in text]), count)
                self.assertNotIn(SECRET, daemon.log())

    def test_check_without_stdout_or_tls(self) -> None:
        keys = {"target_address": TARGET, "secret": SECRET, "server": "localhost:9"}
        without_stdout = Daemon({JID: keys}, "--check", changes="sys.stdout = None")
        without_tls = Daemon({JID: {**keys, "tls": "yes"}}, "--check", changes="sys.modules['ssl'] = None")
        self.addCleanup(without_stdout.close)
        self.addCleanup(without_tls.close)
        self.assertEqual((without_stdout.exit_status(), without_stdout.log()), (0, ""))
        self.assertEqual(without_tls.exit_status(), 78)
        self.assertRegex(without_tls.log(), r"\[proxy.localhost\] tls: this Python has no TLS: .*ssl.*\n\Z")

    def test_error_of_ours_and_a_system_without_threads_end_with_status_1(self) -> None:
        config = {JID: {"target_address": TARGET, "secret": SECRET, "server": "127.0.0.1:9"}}
        crash = "clientproxy.Daemon._tick = lambda self, now: 1 / 0"
        no_threads = """\
def start(thread): raise RuntimeError('none left')
clientproxy.threading.Thread.start = start"""
        early = "clientproxy.Daemon.run = lambda self: 1 / 0"
        # While its streams end for a new thread, the loop's end is expected; not this one.
        renewing = """\
def tick(self, now): self.renewing = True; 1 / 0
clientproxy.Daemon._tick = tick"""
        for changes, expected in ((crash, "ZeroDivisionError"), (early, "ZeroDivisionError"),
                                  (renewing, "ZeroDivisionError"),
                                  (no_threads, "error: the system gives no thread to run in: none left\n")):
            with self.subTest(changes):
                daemon = Daemon(config, changes=changes)
                self.addCleanup(daemon.close)
                self.assertEqual(daemon.exit_status(), 1)
                self.assertIn(expected, daemon.log())

    def test_metrics_address_that_is_taken_ends_with_status_1(self) -> None:
        taken = self.directory() / "metrics"
        taken.write_text("not a socket")
        with contextlib.ExitStack() as sockets:
            sock = sockets.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            sock.listen()
            alive = sockets.enter_context(socket.socket(socket.AF_UNIX))
            alive.bind(str(taken.with_name("alive")))
            alive.listen()
            for metrics in (f"127.0.0.1:{sock.getsockname()[1]}", f"unix:{taken}", f"unix:{alive.getsockname()}"):
                daemon = self.daemon({"clientproxy": {"metrics": metrics}, JID: self.server().keys})
                self.assertEqual(daemon.exit_status(), 1)
                self.assertIn("metrics", daemon.log())
        self.assertEqual(taken.read_text(), "not a socket")

    # -- the way to a stream

    def test_conversation_over_tcp_and_unix_sockets(self) -> None:
        """-v shows the starts of stanzas, never a payload or the secret; an old libxml2 is warned of."""
        for options in ({}, {"path": str(self.directory() / "server")}, {"host": "::1"}):
            with self.subTest(options):
                try:
                    server = self.server(**options)
                except OSError as error:
                    self.assertIn("host", options)
                    self.skipTest(f"no IPv6: {error}")
                daemon = self.daemon({JID: server.keys}, "-v")
                self.assertEqual(server.accept().login("a").serve(), self.SERVED)
                self.assertRegex(daemon.log(), rf"in: iq type='get' id='q1' from='{USER}'")
                self.assertNotIn(SECRET, daemon.log())
                self.assertNotIn("urn:test", daemon.log())
                self.assertEqual("libxml2" in daemon.log(), etree.LIBXML_VERSION < (2, 12))

    def test_every_address_of_a_name_is_tried(self) -> None:
        server = self.server()
        port = int(server.address.rpartition(":")[2])
        with socket.socket() as deaf, contextlib.ExitStack() as waiting:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            for _ in range(3):  # what waits to be accepted fills its queue: it does not answer any more
                sock = waiting.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex(deaf.getsockname())
            changes = f"""
places = [('127.0.0.1', 9), ('127.0.0.1', {deaf.getsockname()[1]}), ('127.0.0.1', {port})]
clientproxy.socket.getaddrinfo = lambda *_, **__: [(clientproxy.socket.AF_INET, 1, 6, '', where) for where in places]
clientproxy.CONNECT_WITHIN = 0.3"""
            self.daemon({JID: {**server.keys, "server": f"xmpp.example:{port}"}}, changes=changes)
            self.assertEqual(server.accept().login("a").serve(), self.SERVED)

    def test_last_addresses_serve_while_the_name_is_not_resolved(self) -> None:
        server = self.server()
        port = int(server.address.rpartition(":")[2])
        changes = f"""
answers = [[(clientproxy.socket.AF_INET, 1, 6, '', ('127.0.0.1', {port}))]]
clientproxy.socket.getaddrinfo = lambda *args, **options: answers.pop()
def pop(): raise clientproxy.socket.gaierror(-3, 'Temporary failure')
class Once(list):
    def pop(self): return super().pop() if self else pop()
answers = Once(answers)
{AT_ONCE}"""
        daemon = self.daemon({JID: {**server.keys, "server": f"xmpp.example:{port}"}}, changes=changes)
        for _ in range(3):
            stream = server.accept().login("a")
            self.assertEqual(stream.serve(), self.SERVED)
            stream.reset()
        daemon.wait_log("xmpp.example.*Temporary failure")

    def test_name_that_is_not_resolved_blocks_nobody(self) -> None:
        server = self.server()
        changes = f"""
import time
real = clientproxy.socket.getaddrinfo
def getaddrinfo(host, *args, **options):
    return time.sleep(3600) if host == 'slow.example' else real(host, *args, **options)
clientproxy.socket.getaddrinfo = getaddrinfo
clientproxy.RESOLVE_WITHIN = 0.3
{AT_ONCE}"""
        daemon = self.daemon({"slow.localhost": {**server.keys, "server": "slow.example:1"}, JID: server.keys},
                             changes=changes)
        stream = server.accept().login("a")
        daemon.wait_log("slow.example is not resolved within", 2)
        self.assertEqual(stream.serve(), self.SERVED)
        threads = int(re.findall(r"Threads:\s+(\d+)",
                                 pathlib.Path(f"/proc/{daemon.process.pid}/status").read_text())[0])
        self.assertLess(threads, 6)

    def test_server_that_says_nothing_is_left(self) -> None:
        server, other = self.server(), self.server()
        daemon = self.daemon({JID: server.keys, "tls.localhost": {**other.keys, "tls": "yes"}},
                             changes=f"{AT_ONCE}\nclientproxy.HANDSHAKE_WITHIN = 0.3")  # fmt: skip
        silent = server.accept()
        self.assertEqual(silent.rest(), [])
        daemon.wait_log(f"{JID}: .*no handshake within")
        half = server.accept()
        half.header()
        half.send(HEADER)
        self.assertEqual(half.rest(), ["handshake - - - > -"])
        self.assertEqual(server.accept().login("a").serve(), self.SERVED)
        daemon.wait_log("tls.localhost: .*no TLS within", 2)

    def test_refusal_is_logged_with_what_to_change(self) -> None:
        for name, word in (("not-authorized", "secret"), ("host-unknown", "Component"), ("conflict", "standby")):
            server = self.server()
            daemon = self.daemon({JID: server.keys})
            stream = server.accept()
            stream.header()
            stream.send(HEADER, f"<stream:error><{name} xmlns='urn:ietf:params:xml:ns:xmpp-streams'/></stream:error>")
            stream.close()
            daemon.wait_log(rf"{name}: .*{word}.*; next attempt in (5|6|7|8|9|1\d|20)\.\d s")

    def test_connection_cut_at_every_byte_of_the_conversation(self) -> None:
        """Whatever the server had said before, it is served again."""
        names = [f"p{number}.localhost" for number in range(8)]
        server = self.server()
        daemon = self.daemon(dict.fromkeys(names, server.keys), changes=AT_ONCE)
        opening = f"{OPEN} id='s1'><handshake/>"
        script = {name: f"{opening}{presence(f'{TARGET}/a', to=name)}{iq(to=name)}" for name in names}
        cuts = {name: iter(range(number, len(script[name]), 8)) for number, name in enumerate(names)}
        reset = itertools.cycle((True, False))
        rounds, kept = 0, []
        while names:
            stream = server.accept()
            name = stream.header().get("to", "")
            cut = next(cuts[name], None)
            if cut is None:
                self._served_again(stream, name)
                names.remove(name)
                kept.append(stream)
                continue
            rounds += 1
            sent = script[name][:cut]
            stream.send(sent)
            if sent.startswith(opening):
                stream.expect("presence probe *")
            stream.reset() if next(reset) else stream.close()
        self.assertEqual(rounds, len(script["p0.localhost"]))
        self.assertEqual(daemon.process.poll(), None)

    def _served_again(self, stream: ServerStream, name: str) -> None:
        stream.send(f"{OPEN} id='s1'><handshake/>", presence(f"{TARGET}/a", to=name))
        stream.expect("presence probe *")
        stream.jid = name
        self.assertEqual(stream.serve("again"), f"iq result again {name} > {USER}")

    def test_request_open_at_a_loss_is_answered_after_the_reconnect(self) -> None:
        server = self.server()
        self.daemon({JID: server.keys}, changes=AT_ONCE)
        stream = server.accept().login("a")
        stream.send(iq(id="open"))
        request = stream.expect("iq get open *")
        stream.send(iq(id="last"))
        stream.sock.shutdown(socket.SHUT_WR)
        stream = server.accept().login()
        for id_ in ("open", "last"):
            self.assertEqual(line(stream.expect("iq *")), f"iq error {id_} {JID} > {USER} wait/recipient-unavailable")
        stream.send(presence(f"{TARGET}/a"), reply(request))
        self.assertEqual(stream.serve(), self.SERVED)

    def test_connections_end_under_load_each_request_has_one_answer(self) -> None:
        server, asked = self.server(), itertools.count()
        self.daemon({JID: server.keys}, changes=AT_ONCE)
        answers: collections.Counter[str] = collections.Counter()
        for number in range(31):
            stream, served = server.accept().login("a"), 0
            if number < 30:
                stream.send(*(iq(id=str(next(asked))) for _ in range(40)))
            while number < 30 and served < 20:
                element = stream.next()
                assert element is not None
                if element.get("type") == "get":
                    stream.send(reply(element))
                    served += 1
                elif local(element) == "iq":
                    answers[element.get("id", "")] += 1
            stream.sock.shutdown(socket.SHUT_WR)
            answers.update(element.get("id", "") for element in iter(stream.next, None)
                           if local(element) == "iq" and element.get("type") != "get")  # fmt: skip
        self.assertEqual(answers, {str(number): 1 for number in range(next(asked))})

    def test_fault_in_a_stanza_is_over_at_once(self) -> None:
        """Back within 2 s, the sender's JID in the log, what was open is answered."""
        server = self.server()
        daemon = self.daemon({JID: {**server.keys, "max_stanza": 100_000}})
        faults = {f"<iq from='{USER}'><a>{'b' * 400_000}": "policy-violation",
                  iq(content="<a><!-- c --></a>"): "restricted-xml", "<foo/>": "unsupported-stanza-type",
                  f"<iq from='{USER}'><a></iq>": "not-well-formed"}  # fmt: skip
        if etree.LIBXML_VERSION >= (2, 12):
            faults[iq(content=nested(5000))] = "not-well-formed"
        stream = server.accept().login("a")
        for text, name in faults.items():
            stream.send(iq(id="open"))
            stream.expect("iq get open *")
            stream.send(text)
            error = stream.expect("error *")
            self.assertEqual(error[0].tag, f"{{urn:ietf:params:xml:ns:xmpp-streams}}{name}")
            self._until_end(stream)
            begin = time.monotonic()
            stream = server.accept()
            self.assertLess(time.monotonic() - begin, 5.0)
            stream.login("a").expect(f"iq error open {JID} > {USER} wait/recipient-unavailable")
            daemon.wait_log(f"{name}.*{re.escape(USER) if 'from' in text else ''}")

    def test_thousand_reconnects_leak_no_descriptor(self) -> None:
        """The pauses are shortened, or there would be no more than some 70 in 20 s for each component."""
        names = [f"p{number}.localhost" for number in range(10)]
        server = self.server()
        daemon = self.daemon(dict.fromkeys(names, server.keys), changes=AT_ONCE.replace("0.02", "0.001"))
        seen = []
        for number in range(1000):
            stream = server.accept()
            name = stream.header().get("to", "")
            stream.send(f"{OPEN} id='s1'><handshake/>", iq(to=name), "<!-- c -->")
            stream.close()
            if number in (100, 999):
                seen.append((daemon.descriptors(), daemon.memory()))
        (before, small), (after, large) = seen
        self.assertLessEqual(after, before + len(names) + 2)
        self.assertLess(large - small, 16 << 20)

    # -- TLS

    def _certificates(self) -> tuple[pathlib.Path, ssl.SSLContext]:
        """A CA of our own, and a server's context with its certificate for localhost."""
        if shutil.which("openssl") is None:
            self.skipTest("no openssl command")
        directory = self.directory()
        (directory / "names").write_text("subjectAltName=DNS:localhost\nauthorityKeyIdentifier=keyid\n")
        for command in (
            "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=test-ca "
            "-addext keyUsage=critical,keyCertSign,cRLSign",  # Python 3.13 insists
            "req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=localhost",
            "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out server.pem -days 2 -extfile names",
        ):
            subprocess.run(["openssl", *command.split()], cwd=directory, check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "server.pem", directory / "server.key")
        return directory / "ca.pem", context

    def test_tls_verifies_the_certificate_for_the_host(self) -> None:
        ca, context = self._certificates()
        server, plain = self.server(tls=context), self.server()
        port = server.address.rpartition(":")[2]
        keys = {**server.keys, "tls": "yes"}
        daemon = self.daemon({
            JID: {**keys, "server": f"localhost:{port}", "tls_ca": ca}, "name.localhost": {**keys, "tls_ca": ca},
            "ca.localhost": {**keys, "server": f"localhost:{port}"},
            "plain.localhost": {**plain.keys, "tls": "yes", "tls_ca": ca},
        })  # fmt: skip
        streams: queue.SimpleQueue[ServerStream] = queue.SimpleQueue()

        def accept() -> None:
            while server.listener.fileno() >= 0:
                with contextlib.suppress(OSError):  # of those that do not trust us
                    streams.put(server.accept())

        for target in (accept, lambda: plain.accept().send("HTTP/1.1 400 Bad Request\r\n\r\n")):
            threading.Thread(target=target, daemon=True).start()
        served = ""
        while not served:
            with contextlib.suppress(OSError):
                stream = streams.get(timeout=PATIENCE)
                served = stream.login("a").serve()
        self.assertEqual(served, self.SERVED)
        stream.send(iq(id="large", content=f"<a>{'b' * 300_000}</a>"))
        self.assertEqual(len(stream.expect("iq get large *")[0].text or ""), 300_000)
        daemon.wait_log("name.localhost: .*certificate is not accepted.*127.0.0.1")
        daemon.wait_log("ca.localhost: .*certificate is not accepted.*tls_ca")
        daemon.wait_log("plain.localhost: .*TLS failed.*first byte")

    # -- bounds

    def test_server_that_does_not_read_harms_nobody_else(self) -> None:
        """What waits to be sent is bounded, and so is what is read; all is answered once the server reads again."""
        stuffed, other = self.server(receive_buffer=65536), self.server()
        daemon = self.daemon({"stuffed.localhost": stuffed.keys, JID: other.keys})
        stream, calm = stuffed.accept().login(), other.accept().login("a")
        stream.expect("presence probe *")
        calm.serve()
        before, sent = daemon.memory(), 0
        batch = "".join(iq(id=f"{number:03}", to=stream.jid) for number in range(100))
        stream.sock.settimeout(1.0)
        rest = b""
        with contextlib.suppress(socket.timeout):
            while sent < 2000:
                rest = batch.encode()
                while rest:
                    rest = rest[stream.sock.send(rest) :]
                sent += 1
        self.assertLess(sent, 2000, "the daemon went on reading")
        self.assertLess(daemon.memory() - before, 24 << 20)
        self.assertEqual(calm.serve(), self.SERVED)
        answers = 0
        stream.sock.settimeout(PATIENCE)
        writer = threading.Thread(target=lambda: stream.sock.sendall(rest), daemon=True)
        writer.start()
        while answers < (sent + 1) * 100:
            answers += line(stream.expect("*")).startswith("iq error ")
        writer.join(PATIENCE)
        self.assertRegex(stream.serve("last"), "iq error last .*unavailable")

    def test_server_that_takes_nothing_any_more_is_left(self) -> None:
        server = self.server(receive_buffer=65536)
        daemon = self.daemon({JID: server.keys}, changes=f"{AT_ONCE}\nclientproxy.STALL = 1.0")
        stream = server.accept().login()
        stream.expect("presence probe *")
        batch = "".join(iq(id=f"x{number}") for number in range(1000)).encode()
        stream.sock.settimeout(0.2)
        end = time.monotonic() + PATIENCE
        while "has taken nothing" not in daemon.log() and time.monotonic() < end:
            with contextlib.suppress(OSError):
                stream.sock.send(batch)
        again = server.accept().login("a")
        again.expect("iq error x*")
        self.assertEqual(again.serve("new"), f"iq result new {JID} > {USER}")

    def test_flood_of_unique_names_is_survived(self) -> None:
        """lxml never forgets a name: streams are opened anew, open requests answered, and the memory falls."""
        server = self.server()
        daemon = self.daemon({JID: server.keys}, changes=f"{AT_ONCE}\nclientproxy.MEMORY_HEADROOM = 12 << 20")
        names, levels = itertools.count(), []
        for _ in range(5):
            stream = server.accept().login("a")
            stream.send(iq(id="open"))
            stream.expect("iq get open *")
            levels.append(daemon.memory())
            if len(levels) == 5:
                self.assertEqual(stream.serve(), self.SERVED)
                break
            end = time.monotonic() + PATIENCE
            while not stream.reader.ended:
                content = "".join(f"<n{next(names):09}-{'x' * 80}/>" for _ in range(1000))
                with contextlib.suppress(OSError):
                    stream.send(iq("result", "nobody", f"{TARGET}/a", JID, f"<a>{content}</a>"))
                while select.select([stream.sock], [], [], 0)[0] and not stream.ended:
                    stream.read()
                self.assertLess(time.monotonic(), end, "no renewal")
            self.assertIn(f"iq error open {JID} > {USER} wait/recipient-unavailable", self._until_end(stream))
            stream.close()
        self.assertEqual(daemon.log().count("memory has grown"), 4)
        self.assertLess(min(levels[2:]) - levels[0], 20 << 20, "what was freed now and then comes late, but it comes")

    # -- signals

    def test_sigterm_waits_for_open_requests(self) -> None:
        server = self.server()
        daemon = self.daemon({"clientproxy": {"drain": PATIENCE}, JID: server.keys})
        stream = server.accept().login("a")
        stream.send(iq(id="open"))
        request = stream.expect("iq get open *")
        daemon.signal(signal.SIGTERM)
        daemon.wait_log("stopping: 1 open")
        self.assertEqual(stream.serve("new"), f"iq error new {JID} > {USER} wait/recipient-unavailable")
        stream.send(reply(request))
        self.assertEqual(self._until_end(stream), [f"iq result open {JID} > {USER}"])
        self.assertEqual(daemon.exit_status(), 0)

    def test_sigterm_answers_what_is_open_when_its_time_is_over(self) -> None:
        server = self.server()
        daemon = self.daemon({"clientproxy": {"drain": "0.3"}, JID: server.keys})
        stream = server.accept().login("a")
        stream.send(iq(id="open"))
        stream.expect("iq get open *")
        daemon.signal(signal.SIGINT)
        self.assertEqual(self._until_end(stream), [f"iq error open {JID} > {USER} wait/recipient-unavailable"])
        self.assertEqual(daemon.exit_status(), 0)

    def test_second_sigterm_ends_at_once(self) -> None:
        server = self.server()
        daemon = self.daemon({"clientproxy": {"drain": "3600"}, JID: server.keys})
        stream = server.accept().login("a")
        stream.send(iq())
        stream.expect("iq get *")
        daemon.signal(signal.SIGTERM)
        daemon.wait_log("stopping: 1 open")
        daemon.signal(signal.SIGTERM)
        self.assertEqual(daemon.exit_status(), 0)

    def test_sigterm_while_the_server_is_away_waits_to_answer(self) -> None:
        server = self.server()
        daemon = self.daemon({"clientproxy": {"drain": PATIENCE}, JID: server.keys}, changes=AT_ONCE)
        stream = server.accept().login("a")
        stream.send(iq(id="open"))
        stream.expect("iq get open *")
        stream.reset()
        again = server.accept()
        daemon.signal(signal.SIGTERM)
        daemon.wait_log("stopping: 1 open")
        again.login()
        self.assertIn(f"iq error open {JID} > {USER} wait/recipient-unavailable", self._until_end(again))
        self.assertEqual(daemon.exit_status(), 0)

    def test_sigterm_before_any_connection_ends_at_once(self) -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            daemon = self.daemon({JID: {"server": f"127.0.0.1:{nobody.getsockname()[1]}", "target_address": TARGET,
                                        "secret": SECRET}})
            daemon.wait_log("Connection refused")
            daemon.signal(signal.SIGTERM)
            self.assertEqual(daemon.exit_status(), 0)

    def test_sighup_changes_only_what_the_file_changes(self) -> None:
        """Compared with the contents of secret_file; changed and removed components answer what they have open."""
        server = self.server()
        secret = self.directory() / "secret"
        secret.write_text(SECRET)
        filed = {"server": server.address, "target_address": TARGET, "secret_file": secret}
        config = {"same.localhost": filed, "changed.localhost": server.keys, "removed.localhost": server.keys}
        daemon = self.daemon(config)
        streams, requests = {}, {}
        for _ in config:
            stream = server.accept().login("a")
            streams[stream.jid] = stream
            stream.send(iq(id="open", to=stream.jid))
            requests[stream.jid] = stream.expect("iq get open *")
        daemon.configure({**config, "same.localhost": {**filed, "timeout": "x"}})
        daemon.signal(signal.SIGHUP)
        daemon.wait_log("same.localhost.*timeout")
        self.assertIn("stays as it was", daemon.log())
        del config["removed.localhost"]
        config = {**config, "changed.localhost": {**server.keys, "timeout": "7"}, "new.localhost": server.keys}
        daemon.configure(config)
        daemon.signal(signal.SIGHUP)
        for name in ("changed.localhost", "removed.localhost"):
            answers = self._until_end(streams[name])
            self.assertEqual(answers, [f"iq error open {name} > {USER} wait/recipient-unavailable"])
        self.assertEqual({server.accept().login("a").jid for _ in range(2)}, {"changed.localhost", "new.localhost"})
        same = streams["same.localhost"]
        same.send(reply(requests["same.localhost"]))
        self.assertEqual(line(same.expect("iq *")), f"iq result open same.localhost > {USER}")
        secret.write_text("another")
        daemon.signal(signal.SIGHUP)
        self.assertEqual(self._until_end(same), [])
        self.assertEqual(server.accept().login(secret="another").jid, "same.localhost")

    def test_request_that_crosses_the_end_of_a_reloaded_stream_is_answered_on_the_next(self) -> None:
        server = self.server()
        daemon = self.daemon({JID: server.keys})
        stream = server.accept().login("a")
        stream.serve()
        daemon.configure({JID: {**server.keys, "timeout": "7"}})
        daemon.signal(signal.SIGHUP)
        while not stream.reader.ended:
            stream.read()
        stream.send(iq(id="late"), "</stream:stream>")
        again = server.accept().login("a")
        self.assertEqual(line(again.expect("iq *")), f"iq error late {JID} > {USER} wait/recipient-unavailable")

    def test_sighup_with_a_metrics_address_that_is_taken_changes_nothing(self) -> None:
        server = self.server()
        daemon = self.daemon({JID: server.keys})
        stream = server.accept().login("a")
        taken, free = self.directory() / "taken", self.directory() / "free"
        taken.touch()
        daemon.configure({"clientproxy": {"metrics": f"unix:{taken}"}, JID: {**server.keys, "policy": "sticky"}})
        daemon.signal(signal.SIGHUP)
        daemon.wait_log("metrics.*stays as it was")
        self.assertEqual(stream.serve(), self.SERVED)
        daemon.configure({"clientproxy": {"metrics": f"unix:{free}", "log_level": "debug"}, JID: server.keys})
        daemon.signal(signal.SIGHUP)
        until(free.exists, what="the new socket")
        self.assertEqual(self._get(f"unix:{free}", "/healthz")[0], 200)
        self.assertEqual(stream.serve("q2"), f"iq result q2 {JID} > {USER}")
        self.assertIn("in: iq type='get' id='q2'", daemon.log())

    def test_sighup_is_ignored_while_stopping(self) -> None:
        server = self.server()
        daemon = self.daemon({"clientproxy": {"drain": PATIENCE}, JID: server.keys})
        stream = server.accept().login("a")
        stream.send(iq(id="open"))
        request = stream.expect("iq get open *")
        daemon.signal(signal.SIGTERM)
        daemon.wait_log("stopping: 1 open")
        daemon.configure({JID: {**server.keys, "timeout": "7"}})
        daemon.signal(signal.SIGHUP)
        self.assertEqual(stream.serve("new"), f"iq error new {JID} > {USER} wait/recipient-unavailable")
        stream.send(reply(request))
        self.assertEqual(self._until_end(stream), [f"iq result open {JID} > {USER}"])
        self.assertEqual(daemon.exit_status(), 0)

    @staticmethod
    def _until_end(stream: ServerStream) -> list[str]:
        """What comes until the daemon ends its stream, which is ended in answer."""
        while not stream.reader.ended:
            stream.read()
            assert not stream.ended, "the daemon closed the connection without </stream:stream>"
        stream.send("</stream:stream>")
        return stream.rest()

    def test_sigusr1_logs_the_figures_of_each_component(self) -> None:
        server = self.server()
        names = ("one.localhost", "two.localhost")
        daemon = self.daemon(dict.fromkeys(names, server.keys))
        streams = [server.accept().login("a") for _ in names]
        for stream in streams:
            stream.serve()
        daemon.signal(signal.SIGUSR1)
        for name in names:
            daemon.wait_log(f"{name}: figures: ready, 1 resources, 0 requests open, 1 answered")

    # -- what others see

    def _get(self, address: str, path: str, method: str = "GET") -> tuple[int, str]:
        if address.startswith("unix:"):
            connection = http.client.HTTPConnection("localhost", timeout=PATIENCE)
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(address[5:])
        else:
            connection = http.client.HTTPConnection(address, timeout=PATIENCE)
        connection.request(method, path)
        response = connection.getresponse()
        try:
            return response.status, response.read().decode()
        finally:
            connection.close()

    def test_metrics_and_health_are_told(self) -> None:
        server = self.server()
        path = self.directory() / "metrics"
        with socket.socket(socket.AF_UNIX) as left:  # by a daemon that was killed
            left.bind(str(path))
        daemon = self.daemon({"clientproxy": {"metrics": f"unix:{path}"}, JID: server.keys,
                              "two.localhost": server.keys})
        address = f"unix:{path}"
        first = server.accept().login("a")
        until(lambda: path.exists() and path.stat().st_mode & 0o777 == 0o660, what="the socket")
        self.assertEqual(self._get(address, "/healthz")[0], 503)
        second = server.accept().login("a")
        second.expect("presence probe *")
        self.assertEqual(self._get(address, "/healthz")[0], 200)
        first.serve()
        first.send(iq("result", "nothing", USER, first.jid), iq(None, "bad", to=first.jid))
        first.expect("iq error bad *")
        status, text = self._get(address, "/metrics?x=1")
        self.assertEqual(status, 200)
        samples = {}
        for row in text.splitlines():
            found = re.fullmatch(r'# (?:HELP|TYPE) \w+ .+|(\w+(?:\{\w+="[^"]*"(?:,\w+="[^"]*")*\})?) ([-+.e\d]+)', row)
            assert found, row
            if found[1]:
                samples[found[1]] = float(found[2])
        for name, labels, value in (
            ("ready", "", 1), ("requests_total", ',outcome="answered"', 1),
            ("requests_total", ',outcome="bad-request"', 1),
            ("open_requests", "", 0), ("resources", "", 1), ("connects_total", "", 1), ("answer_seconds_count", "", 1),
            ("answer_seconds_bucket", ',le="+Inf"', 1), ("dropped_total", ',reason="answer to nothing"', 1),
        ):  # fmt: skip
            self.assertEqual(samples[f'clientproxy_{name}{{component="{first.jid}"{labels}}}'], value)
        self.assertEqual([self._get(address, *request)[0]
                          for request in (("/", "GET"), ("/metrics", "POST"), ("/healthz", "GET"))], [404, 405, 200])
        daemon.signal(signal.SIGTERM)
        for stream in (first, second):
            self._until_end(stream)
        self.assertEqual(daemon.exit_status(), 0)
        self.assertFalse(path.exists())

    def test_http_clients_are_bounded_and_harm_nobody(self) -> None:
        server = self.server()
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{sock.getsockname()[1]}"
        daemon = self.daemon({"clientproxy": {"metrics": address}, JID: server.keys})
        stream = server.accept().login("a")
        stream.serve()
        before = daemon.descriptors()
        host, port = address.split(":")
        slow = [socket.create_connection((host, int(port)), PATIENCE) for _ in range(40)]
        self.assertEqual(self._get(address, "/healthz")[0], 200)
        self.assertLessEqual(daemon.descriptors(), before + 33)
        self.assertEqual(stream.serve("q2"), f"iq result q2 {JID} > {USER}")
        for sock in slow:
            sock.close()

    def test_http_rubbish_is_answered_or_dropped(self) -> None:
        server = self.server()
        path = self.directory() / "metrics"
        self.daemon({"clientproxy": {"metrics": f"unix:{path}"}, JID: server.keys})
        server.accept().login()
        until(path.exists, what="the socket")
        for parts, status in (((b"GET /healthz HT", b"TP/1.0\r\n", b"\r\n"), b"200"), ((b"GET /healthz\n\n",), b"200"),
                              ((b"\r\n\r\n",), b"405"),
                              ((b"\0\xff\n\n",), b"405"), ((b"GET /" + b"x" * 20_000,), b"404"),
                              ((b"GET  \n\n",), b"404")):  # fmt: skip
            with self.subTest(parts[0][:20]), socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(PATIENCE)
                sock.connect(str(path))
                with contextlib.suppress(BrokenPipeError):
                    for part in parts:
                        sock.sendall(part)
                        time.sleep(0.02)
                self.assertEqual(sock.recv(12)[9:], status)
        self.assertEqual(self._get(f"unix:{path}", "/healthz")[0], 200)

    def test_log_that_nobody_reads_any_more_stops_nothing(self) -> None:
        server = self.server()
        daemon = self.daemon({JID: server.keys}, changes="""
import os
reader, writer = os.pipe()
os.dup2(writer, 2)
os.close(reader)""")
        stream = server.accept().login("a")
        self.assertEqual(stream.serve(), self.SERVED)
        daemon.signal(signal.SIGUSR1)
        self.assertEqual(stream.serve("q2"), f"iq result q2 {JID} > {USER}")
        daemon.signal(signal.SIGTERM)
        self._until_end(stream)
        self.assertEqual(daemon.exit_status(), 0)

    def test_service_manager_is_told(self) -> None:
        server = self.server()
        path = self.directory() / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            receiver.bind(str(path))
            receiver.settimeout(PATIENCE)

            def told(word: str) -> str:
                while True:
                    text = receiver.recv(4096).decode()
                    if word in text.splitlines() or word in text:
                        return text

            daemon = self.daemon({JID: server.keys}, NOTIFY_SOCKET=str(path), WATCHDOG_USEC="200000")
            told("WATCHDOG=1")
            stream = server.accept()
            self.assertNotIn("READY=1", [receiver.recv(4096).decode() for _ in range(5)])
            stream.login("a")
            told("READY=1")
            self.assertIn("ready", told("STATUS="))
            daemon.signal(signal.SIGHUP)
            self.assertRegex(told("RELOADING=1"), r"MONOTONIC_USEC=\d+")
            told("READY=1")
            daemon.signal(signal.SIGTERM)
            told("STOPPING=1")
            self._until_end(stream)
        self.assertEqual(daemon.exit_status(), 0)

    def test_journal_gets_priorities(self) -> None:
        server = self.server()
        daemon = self.daemon({JID: server.keys}, changes="""
import os
status = os.fstat(2)
os.environ['JOURNAL_STREAM'] = f'{status.st_dev}:{status.st_ino}'""")
        server.accept().login("a").serve()
        self.assertTrue(all(re.match("<[3467]>", text) for text in daemon.log().splitlines()), daemon.log())


class TestPauses(unittest.TestCase):
    """Reconnect for ever: how long the pauses are."""

    def _link(self) -> clientproxy.Link:
        link = object.__new__(clientproxy.Link)
        link._attempts = 0
        return link

    def test_pauses_grow_to_a_minute_and_begin_anew_after_a_steady_stream(self) -> None:
        link = self._link()
        with mock.patch.object(random, "uniform", lambda low, high: high):
            self.assertEqual([link._pause(None, False, 0.0) for _ in range(9)], [1, 2, 4, 8, 16, 32, 60, 60, 60])
            lasted = ((True, 59.0), (True, 61.0), (False, 0.0))
            self.assertEqual([link._pause(None, *how) for how in lasted], [60, 1, 2])

    def test_pause_is_random_up_to_its_bound(self) -> None:
        pauses = []
        for _ in range(500):
            link = self._link()
            link._attempts = 4
            pauses.append(link._pause(None, False, 0.0))
        self.assertTrue(min(pauses) < 2 and max(pauses) > 14 and max(pauses) <= 16)

    def test_fault_of_a_stanza_never_stretches_the_pause(self) -> None:
        link = self._link()
        for name in ("not-well-formed", "policy-violation", "restricted-xml", "unsupported-stanza-type"):
            for _ in range(100):
                self.assertLessEqual(link._pause(clientproxy.Fault(name, ""), True, 0.0), 1.0)
        self.assertLessEqual(link._pause(None, False, 0.0), 1.0)

    def test_refusal_waits_between_5_and_20_s(self) -> None:
        for name in ("conflict", "not-authorized", "host-unknown"):
            refusal = clientproxy.Fault(name, "", of_server=True)
            pauses = [self._link()._pause(refusal, was_ready, 0.0) for was_ready in (True, False) for _ in range(100)]
            self.assertTrue(min(pauses) >= 5 and max(pauses) <= 20)


# ------------------------------------------------------------------------------------ real servers, real clients


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody uses, below those that the kernel gives to clients.

    Out of that range none can take a server's port while the server is down, nor connect to itself there.
    """
    ports: set[int] = set()
    while len(ports) < count:
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("127.0.0.1", random.randrange(20_000, 32_000)))
            ports.add(sock.getsockname()[1])
    return sorted(ports)


def listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class RealServer:
    """An XMPP server of its own on loopback: its ports and data outlive a restart, its directory ends with close()."""

    name = ""
    filename = ""  # of the configuration; both servers insist on its ending
    deepest = 0  # levels of nested elements in one request that the server itself survives
    longest = 0  # bytes of text in one request that it takes from a client

    def __init__(self) -> None:
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix=f"clientproxy-{self.name.lower()}-"))
        self.file = self.directory / self.filename
        self.c2s_port, self.component_port = free_ports(2)
        self.components: dict[str, str] = {}
        self.users: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)  # Ctrl-C doesn't reach it: it has a session of its own

    @classmethod
    def available(cls) -> bool:
        raise NotImplementedError

    def configuration(self) -> str:
        raise NotImplementedError

    def command(self) -> tuple[list[str], dict[str, str]]:
        """What to execute, and what to add to the environment."""
        raise NotImplementedError

    def start(self, components: dict[str, str] | None = None) -> None:
        """Start, or start again, with these components (JID: secret); None keeps those of the last time."""
        self.components = components if components is not None else self.components
        self.file.write_text(self.configuration())
        command, environment = self.command()
        with open(self.directory / "output.log", "ab") as log:
            self.process = subprocess.Popen(command, env={**os.environ, **environment}, cwd=self.directory, stdout=log,
                                            stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        until(lambda: self.exited() or self.reachable(), what=f"{self.name} listens, see {self.directory}")
        if self.exited():
            raise AssertionError(f"{self.name} did not start:\n{(self.directory / 'output.log').read_text()}")

    def reachable(self) -> bool:
        return listening(self.c2s_port) and listening(self.component_port)

    def exited(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def stop(self) -> None:
        self.end(signal.SIGTERM)

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def end(self, number: signal.Signals) -> None:
        if self.process is None:
            return
        self.process.send_signal(number)
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        # The group is this server's own (start_new_session): what Erlang's port programs leave behind ends here.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process = None

    def restart(self, components: dict[str, str] | None = None) -> None:
        self.stop()
        self.start(components)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def register(self, user: str) -> None:
        """Create an account in the way of a client (XEP-0077); its password is its name."""
        client = Client(self, user, login=False)
        client.handshake()
        answer = client.ask(f"<iq type='set' id='register'><query xmlns='jabber:iq:register'>"
                            f"<username>{user}</username><password>{user}</password></query></iq>")
        client.close()
        if answer.get("type") != "result":
            raise AssertionError(f"{self.name} refused to register {user}: {text_of(answer)}")
        self.users.append(user)


class Prosody(RealServer):
    name = "Prosody"
    filename = "prosody.cfg.lua"
    deepest, longest = 20_000, 200_000  # c2s_stanza_size_limit is 256 KiB

    @classmethod
    def available(cls) -> bool:
        return shutil.which("prosody") is not None

    def configuration(self) -> str:
        components = "".join(f'Component "{jid}"\n    component_secret = "{secret}"\n'
                             for jid, secret in self.components.items())
        return f"""\
run_as_root = true
data_path = "{self.directory}"
pidfile = "{self.directory}/prosody.pid"
log = {{ info = "{self.directory}/prosody.log" }}
interfaces = {{ "127.0.0.1" }}
component_interfaces = {{ "127.0.0.1" }}
c2s_ports = {{ {self.c2s_port} }}
component_ports = {{ {self.component_port} }}
modules_enabled = {{ "roster"; "saslauth"; "disco"; "register" }}
modules_disabled = {{ "s2s" }}
authentication = "internal_plain"
allow_registration = true
c2s_require_encryption = false
allow_unencrypted_plain_auth = true
VirtualHost "localhost"
{components}"""

    def command(self) -> tuple[list[str], dict[str, str]]:
        return ["prosody", "--config", str(self.file), "-F"], {}


class Ejabberd(RealServer):
    """Run by `erl` itself, without Erlang distribution: no node name, no epmd, and the process started is the server.

    ejabberdctl would put `su` between the test and the process that it has to kill.
    """

    name = "ejabberd"
    filename = "ejabberd.yml"
    deepest, longest = 3000, 500_000  # 20,000 levels are the end of the server itself: its parser overflows the stack

    @classmethod
    def available(cls) -> bool:
        return shutil.which("erl") is not None and cls.libraries() is not None

    @staticmethod
    def libraries() -> str | None:
        """The folder of the package's Erlang libraries, which only ejabberdctl knows; None without ejabberd."""
        script = shutil.which("ejabberdctl", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if script is None or not os.access(script, os.R_OK):
            return None
        found = re.search(r"^ERL_LIBS='?([^'\n]+)", pathlib.Path(script).read_text(), re.MULTILINE)
        return found.group(1) if found else None

    def configuration(self) -> str:
        components = "".join(f"      {jid}: {{password: {secret}}}\n" for jid, secret in self.components.items())
        return f"""\
hosts: [localhost]
loglevel: info
s2s_access: none
registration_timeout: infinity
listen:
  - {{port: {self.c2s_port}, ip: "127.0.0.1", module: ejabberd_c2s, starttls: false, shaper: none}}
  - port: {self.component_port}
    ip: "127.0.0.1"
    module: ejabberd_service
    global_routes: false
    shaper_rule: none
    hosts:
{components}modules:
  mod_disco: {{}}
  mod_register: {{}}
  mod_roster: {{}}
"""

    def command(self) -> tuple[list[str], dict[str, str]]:
        environment = {"ERL_LIBS": self.libraries() or "", "EJABBERD_CONFIG_PATH": str(self.file),
                       "EJABBERD_LOG_PATH": str(self.directory / "ejabberd.log"), "ERL_CRASH_DUMP_BYTES": "0",
                       "ERL_INETRC": str(self.directory / "inetrc"), "HOME": str(self.directory)}
        # Without this the resolver is a process of its own, which may ask the network and outlives SIGKILL.
        (self.directory / "inetrc").write_text('{lookup, [file]}.\n{host, {127,0,0,1}, ["localhost"]}.\n')
        return ["erl", "-noinput", "-mnesia", "dir", f'"{self.directory}/spool"', "-s", "ejabberd"], environment

    def kill(self) -> None:
        """SIGKILL, as soon as the accounts are on the disk: Mnesia writes up to 3 s late."""
        accounts = self.directory / "spool" / "passwd.DAT"
        until(lambda: all(user.encode() in accounts.read_bytes() for user in self.users), what="accounts on the disk")
        super().kill()


def text_of(element: Element) -> str:
    return ElementTree.tostring(element, encoding="unicode")


def answered(answer: Element) -> str:
    """`result RESOURCE` with the resource that served (see `Client.serve`), or `error TYPE/CONDITION`."""
    if answer.get("type") == "result":
        return f"result {answer[0].get('by') if len(answer) else ''}"
    return f"error {condition(answer)}"


class Elements:
    """Cuts what a socket brings into the children of the stream's root."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.restart()

    def restart(self) -> None:
        """A new stream begins (RFC 6120 §6.4.6)."""
        self.parser: ElementTree.XMLPullParser[Any] = ElementTree.XMLPullParser(("start", "end"))
        self.events: collections.abc.Iterator[tuple[str, Element]] = iter(())
        self.unread, self.depth = b"", 0
        self.root: Element | None = None

    def header(self) -> Element:
        """The stream header."""
        while self.root is None:
            self.step()
        return self.root

    def next(self) -> Element:
        """The next element. ConnectionError at the end of the stream, TimeoutError where none comes in time."""
        while True:
            found = self.step()
            if found is not None:
                return found

    def step(self) -> Element | None:
        try:
            event = next(self.events, None)
        except ElementTree.ParseError as error:  # Prosody goes on after the end of the stream when it is stopped
            raise ConnectionError(f"the server sent no XML: {error}") from error
        if event is None:
            self.receive()
            return None
        kind, element = event
        self.depth += 1 if kind == "start" else -1
        if self.depth == 0:
            raise ConnectionError("the server closed the stream")
        if self.root is None:
            self.root = element
        elif kind == "end" and self.depth == 1:
            self.root.clear()
            return element
        return None

    def receive(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        # Only what ends with a tag: newer versions of expat put off an unfinished one until much more has come.
        cut = data.rfind(b">") + 1
        if cut:
            self.parser.feed(self.unread + data[:cut])
            self.events = cast("collections.abc.Iterator[tuple[str, Element]]", self.parser.read_events())
        self.unread = data[cut:] if cut else self.unread + data


class Client:
    """A client of the server, logged in as user@localhost/resource; a thread reads what comes.

    `accept`: grants every subscription that is asked for, as the implementing client must.
    """

    def __init__(self, server: RealServer, user: str, resource: str = "test", *, accept: bool = False,
                 login: bool = True) -> None:
        self.user, self.resource, self.accept = user, resource, accept
        self.bare, self.jid = f"{user}@localhost", f"{user}@localhost/{resource}"
        self.sock = socket.create_connection(("127.0.0.1", server.c2s_port), PATIENCE)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.elements = Elements(self.sock)
        self.sending, self.arrival = threading.Lock(), threading.Condition()
        self.inbox: list[Element] = []
        self.handler: Callable[[Element], str | None] | None = None
        self.tally: collections.Counter[str] = collections.Counter()
        self.requests: collections.deque[Element] = collections.deque(maxlen=1000)  # that this client was asked
        self.open: set[str] = set()  # ids of requests without an answer yet
        self.strays: list[str] = []  # answers to nothing, or a second time: there must be none
        self.ids = 0
        self.closed = False
        self.reader = threading.Thread(target=self.read, name=self.jid, daemon=True)
        if login:
            self.login()

    # Logging in: before the reader starts.

    def handshake(self) -> Element:
        """Open a stream. → its features"""
        self.elements.restart()
        self.send("<?xml version='1.0'?><stream:stream xmlns='jabber:client' to='localhost' version='1.0' "
                  "xmlns:stream='http://etherx.jabber.org/streams'>")
        self.elements.header()
        return self.elements.next()

    def ask(self, xml: str) -> Element:
        """Send, and take the next element as the answer."""
        self.send(xml)
        return self.elements.next()

    def login(self) -> None:
        self.handshake()
        plain = base64.b64encode(f"\0{self.user}\0{self.user}".encode()).decode()
        answer = self.ask(f"<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>{plain}</auth>")
        if local(answer) != "success":
            raise AssertionError(f"{self.user} can't log in: {text_of(answer)}")
        features = self.handshake()
        answer = self.ask("<iq type='set' id='bind'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'>"
                          f"<resource>{self.resource}</resource></bind></iq>")
        bound = next(iter(answer[0])).text if answer.get("type") == "result" else text_of(answer)
        if bound != self.jid:
            raise AssertionError(f"bound to {bound} instead of {self.jid}")
        if any(local(feature) == "session" for feature in features):
            self.ask("<iq type='set' id='session'><session xmlns='urn:ietf:params:xml:ns:xmpp-session'/></iq>")
        self.sock.settimeout(None)
        self.reader.start()

    # Reading: the thread's side.

    def read(self) -> None:
        try:
            with contextlib.suppress(OSError):
                while True:
                    self.take(self.elements.next())
        finally:
            with self.arrival:
                self.closed = True
                self.arrival.notify_all()

    def take(self, stanza: Element) -> None:
        if self.accept and local(stanza) == "presence" and stanza.get("type") == "subscribe":
            self.presence("subscribed", to=stanza.get("from"))
        if self.handler and local(stanza) == "iq" and stanza.get("type") in ("get", "set"):
            self.requests.append(stanza)
            self.answer(stanza, self.handler(stanza))
            return
        with self.arrival:
            if is_answer(stanza) and stanza.get("id") not in self.open:
                self.strays.append(text_of(stanza))
            self.open.discard(stanza.get("id", ""))
            self.inbox.append(stanza)
            self.arrival.notify_all()

    def answer(self, request: Element, payload: str | None) -> None:
        if payload is not None:
            id, to = quoteattr(request.get("id", "")), quoteattr(request.get("from", ""))
            self.send(f"<iq type='result' id={id} to={to}>{payload}</iq>")

    def serve(self, handler: Callable[[Element], str | None] | None = None) -> Client:
        """From now on every get or set is answered with the payload that `handler` gives, or not at all for None.

        Without a handler the payload says which resource served, for `answered`.
        """
        self.handler = handler or (lambda request: f"<served xmlns='urn:test' by={quoteattr(self.resource)}/>")
        return self

    # Sending and expecting: the test's side.

    def send(self, xml: str) -> None:
        with self.sending:
            self.sock.sendall(xml.encode())

    def presence(self, kind: str | None = None, to: str | None = None) -> Client:
        self.send("<presence" + (f" type='{kind}'" if kind else "") + (f" to={quoteattr(to)}" if to else "") + "/>")
        return self

    def expect(self, match: Callable[[Element], bool] | None = None, timeout: float = PATIENCE,
               **attributes: str | None) -> Element:
        """The first stanza, come or still to come, that `match` accepts and that has these attributes.

        `tag` is the stanza's name, `from_` the attribute that Python has no name for, None an absent attribute.
        """
        end = time.monotonic() + timeout
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        tag = wanted.pop("tag", None)
        with self.arrival:
            while True:
                for number, stanza in enumerate(self.inbox):
                    if (tag in (None, local(stanza)) and all(stanza.get(key) == wanted[key] for key in wanted)
                            and (match is None or match(stanza))):
                        return self.inbox.pop(number)
                if self.closed:
                    raise ConnectionError(f"{self.jid}: the connection ended")
                if not self.arrival.wait(end - time.monotonic()) and time.monotonic() > end:
                    have = [text_of(stanza)[:300] for stanza in self.inbox]
                    raise TimeoutError(f"{self.jid}: no {attributes} within {timeout:g} s, only {have}")

    def request(self, to: str, payload: str = "<query xmlns='urn:test'/>", type: str = "get",
                id: str | None = None) -> str:
        """Send an IQ. → its id"""
        self.ids += 1
        id = id or f"{self.resource}-{self.ids}"
        self.open.add(id)
        self.send(f"<iq type='{type}' id={quoteattr(id)} to={quoteattr(to)}>{payload}</iq>")
        return id

    def iq(self, to: str, payload: str = "<query xmlns='urn:test'/>", type: str = "get", id: str | None = None,
           timeout: float = PATIENCE) -> Element:
        """Send an IQ. → its answer"""
        id = self.request(to, payload, type, id)
        return self.expect(is_answer, timeout, id=id)

    def load(self, to: str, count: int | None = None, window: int = 32, timeout: float = PATIENCE,
             stop: threading.Event | None = None) -> collections.Counter[str]:
        """Requests, at most `window` open at a time: `count` of them, or until `stop` is set. → answers by `answered`

        `timeout` is the longest time without an answer; what is open then, or when the connection ends, is counted as
        `unanswered`. `self.tally` has the figures meanwhile.
        """
        waiting: set[str] = set()
        sent, self.tally = 0, collections.Counter()
        with contextlib.suppress(OSError):  # TimeoutError, ConnectionError
            while True:
                while len(waiting) < window and sent != count and not (stop and stop.is_set()):
                    waiting.add(self.request(to))
                    sent += 1
                if not waiting:
                    break
                answer = self.expect(lambda stanza: is_answer(stanza) and stanza.get("id") in waiting, timeout)
                waiting.discard(answer.get("id", ""))
                self.tally[answered(answer)] += 1
                if answer.get("type") == "error":
                    time.sleep(0.005)  # a server without the component refuses faster than it can start
        self.tally["unanswered"] = len(waiting)
        return +self.tally

    def close(self) -> None:
        """Close the stream, then the connection."""
        with contextlib.suppress(OSError):
            self.send("</stream:stream>")
        self.cut()

    def cut(self) -> None:
        """End the connection without a word."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        if self.reader.is_alive():
            self.reader.join(PATIENCE)
        self.sock.close()


def is_answer(stanza: Element) -> bool:
    return local(stanza) == "iq" and stanza.get("type") in ("result", "error")


@final
class Flow:
    """Requests that go on in a thread as long as the `with` block lasts; `answers` has the count afterwards."""

    def __init__(self, client: Client, to: str, window: int = 16, timeout: float = PATIENCE) -> None:
        self.client, self.window = client, window
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, args=(to, timeout), daemon=True)
        self.answers: collections.Counter[str] = collections.Counter()

    def run(self, to: str, timeout: float) -> None:
        self.answers = self.client.load(to, None, self.window, timeout, self.stop)

    def __enter__(self) -> Flow:
        self.thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.stop.set()
        self.thread.join()

    def until(self, answer: str, more: int = 100, timeout: float = PATIENCE) -> None:
        """Wait for so many more of these answers."""
        goal = self.client.tally[answer] + more
        until(lambda: self.client.tally[answer] >= goal, timeout, lambda: f"{goal} of {answer!r}: {self.client.tally}")

    def lost(self) -> int:
        return self.answers["unanswered"]

    def refused(self) -> set[str]:
        """The conditions of the errors that came."""
        return {answer.split(" ", 1)[1] for answer in self.answers if answer.startswith("error ")}


class RunningDaemon:
    """The daemon as a process, with a configuration made from {section: {key: value}}."""

    def __init__(self, config: Config) -> None:
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="clientproxy-daemon-"))
        self.file, self.output = self.directory / "clientproxy.conf", self.directory / "log"
        self.configure(config)
        with open(self.output, "wb") as log:
            self.process = subprocess.Popen([sys.executable, str(CLIENTPROXY), "-c", str(self.file)], stdout=log,
                                            stderr=log, stdin=subprocess.DEVNULL)

    def configure(self, config: Config) -> None:
        """Write the configuration; a running daemon reads it at SIGHUP."""
        sections = (f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items())
                    for name, keys in config.items())
        self.file.write_text("\n".join(sections))
        self.file.chmod(0o600)

    def log(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_log(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """Where the log has it, or as soon as it has. Case doesn't matter."""
        end = time.monotonic() + timeout
        while True:
            found = re.search(pattern, self.log(), re.IGNORECASE)
            if found:
                return found
            if time.monotonic() > end:
                raise AssertionError(f"no {pattern!r} in the log within {timeout:g} s:\n{self.log()}")
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and SIGKILL where that doesn't end it. → the exit status"""
        self.process.terminate()
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


PROXY, SECOND = "proxy.localhost", "second.localhost"
# What a request may be answered with while no resource is there, or the one that had it has just left.
GONE = {"wait/recipient-unavailable", "cancel/service-unavailable"}
SOON = 15.0  # the contract promises 2 s, but the servers and the machine take their share too


if TYPE_CHECKING:
    Case = unittest.TestCase
else:
    Case = object  # or unittest would run the class without a server


class EndToEnd(Case):
    """The conversation through a real server. Each test has accounts and a daemon of its own."""

    Server: ClassVar[type[RealServer]]
    server: ClassVar[RealServer]
    numbers = itertools.count(1)

    @classmethod
    def setUpClass(cls) -> None:
        if not cls.Server.available():
            name = cls.Server.name
            skip_or_fail(f"{name} is not installed: apt-get install {name.lower()}")
        cls.server = cls.Server()
        cls.addClassCleanup(cls.server.close)
        cls.server.start({PROXY: "secret", SECOND: "another"})

    def setUp(self) -> None:
        self.number = next(self.numbers)
        self.accounts: set[str] = set()

    # What the tests are made of.

    def account(self, name: str) -> str:
        """The account's name in this test, created at the first call."""
        user = f"{name}{self.number}"
        if user not in self.accounts:
            self.server.register(user)
            self.accounts.add(user)
        return user

    def client(self, name: str, resource: str = "test", accept: bool = False) -> Client:
        client = Client(self.server, self.account(name), resource, accept=accept)
        self.addCleanup(self.finish_client, client)
        return client

    def finish_client(self, client: Client) -> None:
        client.close()
        self.assertEqual(client.strays, [], f"{client.jid} got answers that it had not asked for")

    def implementing(self, *resources: str, name: str = "impl") -> list[Client]:
        return [self.client(name, resource, accept=True).serve().presence() for resource in resources]

    def daemon(self, component: str = PROXY, target: str = "impl", **keys: object) -> RunningDaemon:
        return self.run_daemon({"clientproxy": {"drain": 1}, component: self.section(component, target, **keys)})

    def section(self, component: str, target: str, **keys: object) -> dict[str, object]:
        return {"target_address": f"{target}{self.number}@localhost", "secret": self.server.components[component],
                "server": f"127.0.0.1:{self.server.component_port}", **keys}

    def run_daemon(self, config: Config) -> RunningDaemon:
        daemon = RunningDaemon(config)
        self.addCleanup(self.finish_daemon, daemon)
        return daemon

    def finish_daemon(self, daemon: RunningDaemon) -> None:
        self.addCleanup(daemon.close)
        if daemon.process.poll() is None:
            self.assertEqual(daemon.stop(), 0, daemon.log())
        self.assertNotIn("Traceback", daemon.log())

    def ask(self, client: Client, to: str = PROXY, timeout: float = 3.0) -> str:
        """The answer to a request by `answered`, or `unanswered`."""
        try:
            return answered(client.iq(to, timeout=timeout))
        except TimeoutError:
            return "unanswered"

    def until_served(self, client: Client, *resources: str, to: str = PROXY, timeout: float = PATIENCE) -> float:
        """Ask until each of these resources has answered. → seconds that it took"""
        start, missing = time.monotonic(), {f"result {resource}" for resource in resources}

        def all_served() -> bool:
            missing.discard(self.ask(client, to))
            return not missing

        until(all_served, timeout, lambda: f"answers of {missing} at {to}")
        return time.monotonic() - start

    def until_refused(self, client: Client, *conditions: str, timeout: float = PATIENCE) -> None:
        until(lambda: self.ask(client) in {f"error {each}" for each in conditions}, timeout, f"one of {conditions}")

    # The conversation.

    def test_seed_conversation_arrives_attribute_for_attribute(self) -> None:
        alice, impl = self.client("alice", "abc"), self.implementing("a")[0]
        self.daemon()
        self.until_served(alice, "a")
        impl.serve(lambda request: "<query xmlns='urn:test' kept='yes'/>")
        answer = alice.iq(PROXY, "<query xmlns='urn:test' node='&lt;&amp;>'>\u00e9</query>", id="1234")
        seen = impl.requests[-1]
        self.assertEqual(headers(seen), {"type": "get", "id": "1234", "to": impl.jid, "from": f"{PROXY}/{alice.jid}"})
        self.assertEqual(payloads(seen), [("{urn:test}query", {"node": "<&>"}, "\u00e9")])
        self.assertEqual(headers(answer), {"type": "result", "id": "1234", "to": alice.jid, "from": PROXY})
        self.assertEqual(payloads(answer), [("{urn:test}query", {"kept": "yes"}, None)])

    def test_request_to_an_address_of_the_component_is_answered_from_there(self) -> None:
        alice = self.client("alice")
        self.implementing("a")
        self.daemon()
        self.until_served(alice, "a")
        for address in (f"{PROXY}/res", f"node@{PROXY}", f"node@{PROXY}/res"):
            self.assertEqual(alice.iq(address).get("from"), address)

    def test_same_id_from_two_users_each_gets_his_answer(self) -> None:
        alice, bob = self.client("alice"), self.client("bob")
        impl = self.implementing("a")[0]
        impl.serve(lambda request: f"<for xmlns='urn:test' by={quoteattr(request.get('from', ''))}/>")
        self.daemon()
        self.until_served(alice, f"{PROXY}/{alice.jid}")
        for client in (alice, bob):
            client.request(PROXY, id="same")
        for client in (alice, bob):
            answer = client.expect(is_answer, id="same")
            self.assertEqual(answered(answer), f"result {PROXY}/{client.jid}")

    def test_unanswered_request_times_out(self) -> None:
        alice, impl = self.client("alice"), self.implementing("a")[0]
        self.daemon(timeout=1)
        self.until_served(alice, "a")
        impl.serve(lambda request: None)
        self.assertEqual(self.ask(alice, timeout=PATIENCE), "error wait/remote-server-timeout")

    def test_two_components_in_one_daemon_are_served_apart(self) -> None:
        alice = self.client("alice")
        self.implementing("a", name="one")
        self.implementing("b", name="two")
        self.run_daemon({PROXY: self.section(PROXY, "one"), SECOND: self.section(SECOND, "two")})
        self.until_served(alice, "a")
        self.until_served(alice, "b", to=SECOND)
        self.assertEqual(alice.load(PROXY, 20), {"result a": 20})
        self.assertEqual(alice.load(SECOND, 20), {"result b": 20})

    # Resources come and go.

    def test_two_resources_share_the_load(self) -> None:
        alice = self.client("alice")
        self.implementing("a", "b")
        self.daemon()
        self.until_served(alice, "a", "b")
        answers = alice.load(PROXY, 400)
        self.assertEqual(set(answers), {"result a", "result b"}, answers)
        self.assertGreater(min(answers.values()), 100, answers)  # less happens once in 10^24 runs

    def test_resource_leaves_under_load_nothing_is_lost(self) -> None:
        self.leave(Client.close)

    def test_resource_is_cut_off_under_load_nothing_is_lost(self) -> None:
        self.leave(Client.cut)

    def leave(self, go: Callable[[Client], None]) -> None:
        alice, (first, _) = self.client("alice"), self.implementing("a", "b")
        self.daemon()
        self.until_served(alice, "a", "b")
        with Flow(alice, PROXY) as flow:
            flow.until("result a")
            go(first)
            flow.until("result b", 300)
        self.assertEqual(flow.lost(), 0, flow.answers)
        self.assertLessEqual(flow.refused(), GONE, flow.answers)
        self.assertEqual(alice.load(PROXY, 100), {"result b": 100})

    def test_all_resources_leave_and_come_back(self) -> None:
        alice, impls = self.client("alice"), self.implementing("a", "b")
        self.daemon()
        self.until_served(alice, "a", "b")
        with Flow(alice, PROXY) as flow:
            flow.until("result a")
            for impl in impls:
                impl.close()
            flow.until("error cancel/service-unavailable", 10)
        self.assertEqual(flow.lost(), 0, flow.answers)
        self.assertLessEqual(flow.refused(), GONE, flow.answers)
        self.implementing("c")
        self.until_served(alice, "c")

    def test_account_created_later_is_found(self) -> None:
        alice = self.client("alice")
        self.daemon()
        self.until_refused(alice, *GONE)
        self.until_refused(alice, "cancel/service-unavailable")
        self.implementing("a")
        self.until_served(alice, "a")

    def test_subscription_accepted_later_is_noticed(self) -> None:
        alice, impl = self.client("alice"), self.client("impl", "a").serve().presence()
        daemon = self.daemon()
        impl.expect(tag="presence", type="subscribe", from_=PROXY)
        self.until_refused(alice, "cancel/service-unavailable")
        daemon.wait_log("subscri")
        time.sleep(0.5)  # the rounds come after 0, 1, 3 and 7 s: past the third, none hides a lost acceptance
        impl.presence("subscribed", to=PROXY)
        # At once: the next round of probe and subscribe comes up to 300 s later. Prosody forgets the open request for
        # subscription at a probe, so that of the two the subscribe has to be the last.
        self.until_served(alice, "a", timeout=3)
        lines = [line.split(" ", 1)[1] for line in daemon.log().splitlines()]
        self.assertEqual(len(lines), len(set(lines)), f"a state is logged once, when it changes:\n{daemon.log()}")

    # The server or the daemon dies.

    def test_server_killed_under_load_is_served_again(self) -> None:
        self.outage(self.server.kill)

    def test_server_stopped_under_load_is_served_again(self) -> None:
        self.outage(self.server.stop)

    def outage(self, end: Callable[[], None]) -> None:
        alice = self.client("alice")
        self.implementing("a")
        self.daemon()
        self.until_served(alice, "a")
        with Flow(alice, PROXY) as flow:
            flow.until("result a", 500)
            end()
        self.server.start()
        self.assertLessEqual(flow.lost(), flow.window, flow.answers)
        self.implementing("a")
        again = self.client("alice", "again")
        with Flow(again, PROXY) as flow:  # from before the daemon is back: whoever asks has an answer
            flow.until("result a", 500)
        self.assertEqual(flow.lost(), 0, flow.answers)
        self.assertEqual(again.load(PROXY, 100), {"result a": 100})

    def test_wrong_secret_is_named_and_served_once_put_right(self) -> None:
        secret = self.server.components[SECOND] + "-changed"
        daemon = self.daemon(SECOND, secret=secret)
        daemon.wait_log(rf"{re.escape(SECOND)}.*secret")
        self.server.restart({**self.server.components, SECOND: secret})
        self.implementing("a")
        self.until_served(self.client("alice"), "a", to=SECOND)
        self.assertNotIn(secret, daemon.log())

    def test_killed_daemon_started_again_serves_soon(self) -> None:
        alice = self.client("alice")
        self.implementing("a")
        first = self.daemon()
        self.until_served(alice, "a")
        with Flow(alice, PROXY, timeout=3) as flow:
            flow.until("result a", 500)
            first.kill()
        self.daemon()
        took = self.until_served(alice, "a")
        print(f"{self.server.name}: killed daemon served again {took:.1f} s after its start, {flow.lost()} unanswered")
        self.assertLess(took, 5)  # 2 s are promised, and 0.3 s usual
        self.assertLessEqual(flow.lost(), flow.window)
        self.assertEqual(alice.load(PROXY, 100), {"result a": 100})

    def test_sigterm_answers_what_is_open(self) -> None:
        alice, impl = self.client("alice"), self.implementing("a")[0]
        daemon = self.daemon()
        self.until_served(alice, "a")
        impl.serve(lambda request: None)
        impl.requests.clear()
        ids = [alice.request(PROXY) for _ in range(5)]
        until(lambda: len(impl.requests) == len(ids), what="all requests reach the implementing client")
        self.assertEqual(daemon.stop(), 0)
        for id in ids:
            self.assertEqual(condition(alice.expect(is_answer, id=id)), "wait/recipient-unavailable")

    # Remote users who want to harm the others.

    # What goes beyond requests: README, "A whole service in a client".

    def test_relay_carries_messages_presence_and_requests_of_the_client(self) -> None:
        alice, impl = self.client("alice").presence(), self.implementing("a")[0]
        self.daemon(relay="message presence iq", policy="sticky")
        self.until_served(alice, "a")
        encoded = f"{PROXY}/{alice.jid}"
        alice.send(f"<message to='{PROXY}' id='m1' type='chat'><body>hi</body></message>")
        self.assertEqual(impl.expect(tag="message", id="m1").get("from"), encoded)
        impl.send(f"<message to={quoteattr(encoded)} id='m2' type='chat'><body>hello</body></message>")
        self.assertEqual(alice.expect(tag="message", id="m2").get("from"), PROXY)
        alice.presence(to=PROXY)
        impl.expect(tag="presence", from_=encoded, type=None)
        alice.presence("unavailable", to=PROXY)
        impl.expect(tag="presence", from_=encoded, type="unavailable")
        impl.presence(to=encoded)
        alice.expect(tag="presence", from_=PROXY, type=None)
        alice.serve()
        answer = impl.iq(encoded)
        self.assertEqual((answer.get("from"), answered(answer)), (encoded, "result test"))
        nobody = impl.iq(f"{PROXY}/@@//")
        self.assertEqual(answered(nobody), "error cancel/item-not-found")

    def test_service_of_the_readme_answers_commands_and_greets(self) -> None:
        """The very text of the README, run by an interpreter that has slixmpp."""
        if subprocess.run([SLIXMPP_PYTHON, "-c", "import slixmpp"], capture_output=True).returncode:
            skip_or_fail(f"{SLIXMPP_PYTHON} has no slixmpp; CLIENTPROXY_SLIXMPP may name one that has")
        alice = self.client("alice")
        self.daemon(target="service", relay="message", policy="sticky")
        self.run_service(self.account("service"))
        until(lambda: alice.iq(PROXY, DISCO).get("type") == "result", what="an answer of the service")
        identity = alice.iq(PROXY, DISCO).find(f".//{{{NS_DISCO}}}identity[@category='automation']")
        self.assertIsNotNone(identity)
        form = alice.iq(PROXY, f"<command xmlns='{NS_COMMANDS}' node='greet' action='execute'/>", "set")
        session = form.find(f"{{{NS_COMMANDS}}}command")
        self.assertIsNotNone(session, text_of(form))
        session_id = quoteattr(cast(Element, session).get("sessionid", ""))
        fields = "<x xmlns='jabber:x:data' type='submit'><field var='name'><value>Romeo</value></field></x>"
        head = f"<command xmlns='{NS_COMMANDS}' node='greet' action='complete' sessionid={session_id}>"
        done = alice.iq(PROXY, f"{head}{fields}</command>", "set")
        self.assertEqual(done.findtext(f".//{{{NS_COMMANDS}}}note"), "Hello, Romeo!", text_of(done))
        alice.send(f"<message to='{PROXY}' type='chat'><body>hi</body></message>")
        greeting = alice.expect(tag="message", from_=PROXY)
        self.assertEqual(greeting.findtext("{jabber:client}body"), f"Hello, {alice.jid}!")

    def run_service(self, user: str) -> None:
        readme = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")
        directory = tempfile.mkdtemp(prefix="clientproxy-service-")
        self.addCleanup(shutil.rmtree, directory, ignore_errors=True)
        text = readme.split("```python\n")[1].split("```")[0]
        pathlib.Path(directory, "service.py").write_text(text, encoding="utf-8")
        process = subprocess.Popen(
            [SLIXMPP_PYTHON, "-c", RUN_SERVICE, f"{user}@localhost", user, str(self.server.c2s_port)],
            cwd=directory, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)

    def test_hostile_requests_others_are_served(self) -> None:
        alice = self.client("alice")
        self.implementing("a")
        daemon = self.daemon()
        for name, payload in self.hostile().items():
            with self.subTest(name):
                self.until_served(alice, "a")
                answer, took = self.attack(alice, daemon, name, payload)
                print(f"{self.server.name}: {name}: {answer}, others served after {took:.1f} s")
                if name in ("300 nested", "2000 nested"):
                    self.assertEqual(answer, "result a")

    def hostile(self) -> dict[str, str]:
        payloads = {f"{levels} nested": nested(levels) for levels in (300, 2000, 3000, 20_000)
                    if levels <= self.server.deepest}
        payloads["attributes"] = "<n xmlns='urn:test'" + "".join(f" a{each}=''" for each in range(20_000)) + "/>"
        payloads["text"] = f"<n xmlns='urn:test'>{'x' * self.server.longest}</n>"
        return payloads

    def test_unique_names_without_end_others_are_served(self) -> None:
        alice = self.client("alice")
        self.implementing("a")
        daemon = self.daemon()
        self.until_served(alice, "a")
        for number in range(6):
            names = "".join(f"<n{number}-{each}/>" for each in range(10_000))
            answer, _ = self.attack(alice, daemon, f"names {number}", f"<n xmlns='urn:test'>{names}</n>")
            self.assertEqual(answer, "result a")

    def attack(self, alice: Client, daemon: RunningDaemon, name: str, payload: str) -> tuple[str, float]:
        """Let mallory ask, then alice. → what became of his request, and after how many seconds alice had her answer

        Where the stream was lost with mallory's request, the log must name him.
        """
        mallory, start = self.client("mallory", name), time.monotonic()
        id = mallory.request(PROXY, payload)
        until(lambda: id not in mallory.open or mallory.closed or mallory.jid in daemon.log(),
              what=lambda: f"an answer to {mallory.jid}, or his name in the log:\n{daemon.log()}")
        outcome = "his name in the log"
        if id not in mallory.open:
            outcome = answered(mallory.expect(is_answer, id=id))
        elif mallory.closed:
            outcome = "refused by the server"
        self.until_served(alice, "a", timeout=SOON)
        return outcome, time.monotonic() - start


def headers(stanza: Element) -> dict[str, str]:
    """The attributes without xml:lang, which servers add."""
    return {key: value for key, value in stanza.attrib.items() if not key.startswith("{")}


def payloads(stanza: Element) -> list[tuple[str, dict[str, str], str | None]]:
    return [(child.tag, dict(child.attrib), child.text) for child in stanza]


class TestProsody(EndToEnd, unittest.TestCase):
    Server = Prosody

    def test_second_instance_waits_and_takes_over(self) -> None:
        alice = self.client("alice")
        self.implementing("a")
        first = self.daemon()
        self.until_served(alice, "a")
        second = self.daemon()
        second.wait_log("conflict")
        with Flow(alice, PROXY, timeout=3) as flow:
            flow.until("result a", 500)
            first.kill()
        took = self.until_served(alice, "a")
        print(f"Prosody: standby served {took:.1f} s after the kill, {flow.lost()} of {flow.window} stayed unanswered")
        self.assertLess(took, 30)
        self.assertLessEqual(flow.lost(), flow.window)
        self.assertEqual(alice.load(PROXY, 100), {"result a": 100})


class TestEjabberd(EndToEnd, unittest.TestCase):
    Server = Ejabberd


# ----------------------------------------------------------------------------------------------- installation


class Installed(unittest.TestCase):
    """A temporary directory to install into."""

    def setUp(self) -> None:
        self.tmp = pathlib.Path(tempfile.mkdtemp(prefix="clientproxy-install-"))
        self.addCleanup(shutil.rmtree, self.tmp, ignore_errors=True)
        self.tmp.chmod(0o755)  # another user looks into it

    def make(self, target: str, **variables: Union[str, pathlib.Path]) -> str:
        # a `make test PYTHON=...` around us must not reach the inner make
        outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "DESTDIR", "PREFIX", "SYSCONFDIR")
        ran = subprocess.run(
            ["make", "--no-print-directory", target, *(f"{key}={value}" for key, value in variables.items())],
            cwd=CLIENTPROXY.parent, timeout=60,
            env={key: value for key, value in os.environ.items() if key not in outer},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.assertEqual(ran.returncode, 0, ran.stdout)
        return ran.stdout


class InstallTest(Installed):
    """`make install` and `make uninstall`, and the systemd unit."""

    def files(self, root: pathlib.Path) -> dict[str, int]:
        """Return what was installed below root, with its mode."""
        found = [path for path in root.rglob("*") if not path.is_dir()]
        return {str(path.relative_to(root)): path.stat().st_mode & 0o7777 for path in found}

    def test_staged_install_twice_keeps_configuration_and_uninstall_leaves_it(self) -> None:
        for prefix, unitdir in (("/usr", "lib/systemd/system"), ("/usr/local", "usr/local/lib/systemd/system")):
            with self.subTest(prefix=prefix):
                root = self.tmp / prefix.replace("/", "_")
                self.make("install", DESTDIR=root, PREFIX=prefix)
                program, service = f"{prefix[1:]}/bin/clientproxy.py", f"{unitdir}/clientproxy.service"
                modes = {"etc/clientproxy.conf": 0o640, "etc/init.d/clientproxy": 0o755, service: 0o644, program: 0o755}
                self.assertEqual(self.files(root), modes)
                unit, script = (root / service).read_text(), (root / "etc/init.d/clientproxy").read_text()
                self.assertIn(f"ExecStart={prefix}/bin/clientproxy.py -c /etc/clientproxy.conf\n", unit)
                self.assertIn("ExecReload=/bin/kill -HUP $MAINPID\n", unit)
                self.assertIn("User=clientproxy\n", unit)
                self.assertIn(f"DAEMON={prefix}/bin/clientproxy.py\n", script)
                self.assertNotRegex(unit + script, r"@[A-Z]+@")
                self.assertEqual((root / program).read_bytes(), (CLIENTPROXY.parent / "clientproxy.py").read_bytes())
                conf = root / "etc/clientproxy.conf"
                conf.write_text("mine")
                self.assertIn("kept as it is", self.make("install", DESTDIR=root, PREFIX=prefix))
                self.assertEqual(conf.read_text(), "mine")
                self.make("uninstall", DESTDIR=root, PREFIX=prefix)
                self.assertEqual(list(self.files(root)), ["etc/clientproxy.conf"])
                self.assertEqual(conf.read_text(), "mine")

    def test_given_interpreter_goes_into_the_shebang(self) -> None:
        self.make("install", DESTDIR=self.tmp, PYTHON=sys.executable)
        first, rest = (self.tmp / "usr/local/bin/clientproxy.py").read_text().split("\n", 1)
        self.assertEqual(first, f"#!{os.path.abspath(sys.executable)}")
        self.assertEqual(rest, (CLIENTPROXY.parent / "clientproxy.py").read_text().split("\n", 1)[1])

    @unittest.skipUnless(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    def test_unit_passes_systemd_analyze(self) -> None:
        self.make("install", PREFIX=self.tmp / "usr", SYSCONFDIR=self.tmp / "etc", SERVICE_USER="nobody")
        unit = self.tmp / "usr/lib/systemd/system/clientproxy.service"
        ran = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], timeout=60, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        ours = [line for line in ran.stdout.splitlines() if "clientproxy" in line]
        complaints = [line for line in ours if "Special user nobody" not in line]
        self.assertEqual((ran.returncode, complaints), (0, []), ran.stdout)


@unittest.skipUnless(os.geteuid() == 0 and shutil.which("start-stop-daemon"), "needs root and start-stop-daemon")
class InitScriptTest(Installed):
    """The SysV script with the real daemon, installed below a temporary directory and run as nobody."""

    RIGHT = "[proxy.localhost]\ntarget_address = impl@localhost\nserver = localhost:1\nsecret = s\n"

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(self.end)
        # nobody must be able to run it: the interpreter of the tests may lie in root's home
        tried = subprocess.run(["runuser", "-u", "nobody", "--", sys.executable, "-c", "import lxml.etree"],
                               stderr=subprocess.DEVNULL)  # fmt: skip
        python = sys.executable if tried.returncode == 0 else "/usr/bin/python3"
        (self.tmp / "run").mkdir()
        self.make("install", PREFIX=self.tmp / "usr", SYSCONFDIR=self.tmp / "etc", RUNSTATEDIR=self.tmp / "run",
                  SERVICE_USER="nobody", PYTHON=python)  # fmt: skip
        self.conf, self.pidfile = self.tmp / "etc/clientproxy.conf", self.tmp / "run/clientproxy.pid"
        self.configure(self.RIGHT)
        self.log: Optional[socket.socket] = None
        if not os.path.lexists("/dev/log"):  # no syslogd here: be it
            self.log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self.log.settimeout(5)
            self.log.bind("/dev/log")
            self.addCleanup(self.log.close)
            self.addCleanup(os.unlink, "/dev/log")
            os.chmod("/dev/log", 0o666)

    def configure(self, text: str) -> None:
        self.conf.write_text(text)

    def end(self) -> None:
        if self.pidfile.exists():
            pid = int(self.pidfile.read_text())
            if self.alive(pid) and b"clientproxy.py" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    @staticmethod
    def alive(pid: int) -> bool:
        stat = pathlib.Path(f"/proc/{pid}/stat")
        try:
            return stat.read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    def script(self, command: str, expected: int = 0) -> str:
        # output into a file, not a pipe: a daemon that kept our output open must not be waited for, and shows as a hang
        with tempfile.TemporaryFile("w+") as out:
            ran = subprocess.run(
                [str(self.tmp / "etc/init.d/clientproxy"), command], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                env={**os.environ, "SYSTEMCTL_SKIP_REDIRECT": "1"}, timeout=30,
            )  # fmt: skip
            out.seek(0)
            said = out.read()
        self.assertEqual(ran.returncode, expected, f"{command}: {said}")
        return said

    def pid(self) -> int:
        return int(self.pidfile.read_text())

    def logged(self, what: str) -> None:
        if self.log is None:
            return
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            line = self.log.recv(65536).decode()
            if re.search(what, line):
                self.assertIn("clientproxy: ", line)
                return
        self.fail(f"{what} is not in the syslog")

    def test_whole_life(self) -> None:
        self.assertIn("stopped", self.script("status", 3))
        self.script("configtest")
        self.script("start")
        pid = self.pid()
        self.assertTrue(self.alive(pid))
        # the daemon's own number, not that of a shell or of logger, and the right user
        self.assertIn(b"clientproxy.py\0-c\0", pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())
        self.assertEqual(os.stat(f"/proc/{pid}").st_uid, pwd.getpwnam("nobody").pw_uid)
        self.assertFalse((self.tmp / "run/clientproxy.pid.log").exists())
        self.logged("proxy.localhost|started")
        self.assertIn(str(pid), self.script("status"))
        self.assertIn("already running", self.script("start"))
        self.assertEqual(self.pid(), pid)
        self.script("reload")
        self.logged("reload")
        self.script("force-reload")
        self.assertEqual(self.pid(), pid)
        self.script("restart")
        self.assertFalse(self.alive(pid))
        self.assertNotEqual(self.pid(), pid)
        pid = self.pid()
        self.script("stop")
        self.assertFalse(self.alive(pid))
        self.assertFalse(self.pidfile.exists())
        self.script("stop")
        self.script("status", 3)
        self.script("reload", 1)
        self.script("restart")  # LSB: starts a stopped service
        self.script("stop")

    def test_wrong_configuration_starts_nothing_and_ends_nothing(self) -> None:
        self.configure(self.RIGHT + "bogus = 1\n")
        self.assertIn("bogus", self.script("configtest", 78))
        self.assertIn("bogus", self.script("start", 6))
        self.script("status", 3)
        self.configure(self.RIGHT)
        self.script("start")
        pid = self.pid()
        self.configure(self.RIGHT + "bogus = 1\n")
        for command in ("reload", "restart"):
            self.assertIn("bogus", self.script(command, 6))
        self.script("status")
        self.assertEqual(self.pid(), pid)
        self.script("stop")

    def test_configuration_that_the_user_may_not_read_is_found_by_configtest(self) -> None:
        self.conf.chmod(0o600)
        os.chown(self.conf, 0, 0)
        self.script("configtest", 78)

    def test_program_that_the_user_may_not_execute_is_found_by_configtest(self) -> None:
        (self.tmp / "usr/bin/clientproxy.py").chmod(0o700)
        self.assertIn("Permission denied", self.script("configtest", 2))
        self.assertIn("Permission denied", self.script("start", 6))

    def test_stale_pid_file_is_no_daemon(self) -> None:
        with subprocess.Popen(["sleep", "60"]) as bystander:
            try:
                self.pidfile.write_text(f"{bystander.pid}\n")  # a number that belongs to another program by now
                self.script("status", 1)
                self.script("stop")
                self.assertIsNone(bystander.poll())
                self.pidfile.write_text(f"{bystander.pid}\n")
                self.script("start")
                self.assertNotEqual(self.pid(), bystander.pid)
                self.script("status")
            finally:
                bystander.kill()
        os.kill(self.pid(), signal.SIGKILL)
        time.sleep(0.2)
        self.script("status", 1)
        self.script("start")
        self.script("stop")

    def test_usage(self) -> None:
        self.assertIn("Usage", self.script("nonsense", 2))

    @unittest.skipUnless(shutil.which("shellcheck"), "shellcheck is not installed")
    def test_shellcheck(self) -> None:
        script = str(self.tmp / "etc/init.d/clientproxy")
        ran = subprocess.run(["shellcheck", script], stdout=subprocess.PIPE, text=True)
        self.assertEqual((ran.returncode, ran.stdout), (0, ""))


# ----------------------------------------------------------------------------------------------------- tools


NS_ACCEPT = "jabber:component:accept"
STREAM_HEADER = (
    "<?xml version='1.0'?><stream:stream xmlns='jabber:component:accept' "
    "xmlns:stream='http://etherx.jabber.org/streams' from='{}' id='{}'>"
)

# ----------------------------------------------------------------------- the daemon, as the tools run it


class ToolFailure(Exception):
    """A tool cannot go on, or has found what must not be; its text is for a person."""


class ToolDaemon:
    """A process that connects to us, in a directory of its own; the real daemon where no command is given."""

    def __init__(self, configuration: str, command: tuple[str, ...] = ()) -> None:
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="clientproxy-"))
        self.file, self.output = self.directory / "clientproxy.conf", self.directory / "log"
        self.file.write_text(configuration)
        self.file.chmod(0o600)
        self.command = command or (sys.executable, str(CLIENTPROXY), "-c", str(self.file))
        self.started = time.monotonic()
        with open(self.output, "wb") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.pid = self.process.pid

    def log(self) -> str:
        return self.output.read_text(errors="replace")

    def check(self) -> None:
        """Raise ToolFailure if the process has ended."""
        if self.process.poll() is not None:
            raise ToolFailure(f"the process has ended with status {self.process.returncode}; its log:\n{self.log()}")

    def stop(self) -> int:
        """End it by SIGTERM and return its exit status; SIGKILL after 10 s."""
        self.process.terminate()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- demo

Stanza = Element


def waited(condition: Callable[[], object], pump: Callable[[float], object], seconds: float) -> bool:
    """Whether a condition comes true in a time, in which pump() is called again and again."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        pump(0.05)
    return True


class DemoServer:
    """An XMPP server on loopback: a component on a socket (XEP-0114), accounts as functions in this process."""

    def __init__(self, component: str, secret: str) -> None:
        self.component = component
        self.accounts: dict[str, Callable[[Stanza], None]] = {}  # full or bare JID -> what takes its stanzas
        self.ready = self.ended = False
        self.taken: Callable[[Stanza], None] = lambda stanza: None  # sees what is taken from the component
        self._secret = secret
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sock: Optional[socket.socket] = None
        self._parser: Any = ElementTree.XMLPullParser(("start", "end"))
        self._open: list[Stanza] = []  # elements, the outermost first

    def send(self, stanza: str) -> None:
        """Deliver a stanza to the component."""
        assert self._sock is not None
        self._sock.sendall(stanza.encode())

    def pump(self, timeout: float) -> None:
        """Take what the component has sent and route it; wait for it as long as `timeout` seconds."""
        if not select.select([self._sock or self._listener], [], [], timeout)[0]:
            return
        if self._sock is None:
            self._sock = self._listener.accept()[0]
            return
        data = self._sock.recv(65536)
        self.ended = not data
        self._parser.feed(data)
        for event, element in self._parser.read_events():
            self._parsed(event, element)

    def _parsed(self, event: str, element: Stanza) -> None:
        if event == "start":
            self._open.append(element)
            if len(self._open) == 1:
                self.send(STREAM_HEADER.format(self.component, "demo-stream"))
            return
        self._open.pop()
        if len(self._open) == 1:
            self._open[0].remove(element)
            self._route(element)
        elif not self._open:
            self.send("</stream:stream>")

    def _route(self, stanza: Stanza) -> None:
        if stanza.tag == f"{{{NS_ACCEPT}}}handshake":
            digest = hashlib.sha1(f"demo-stream{self._secret}".encode()).hexdigest()
            if stanza.text != digest:
                raise ToolFailure("the daemon's handshake is wrong")
            self.ready = True
            self.send("<handshake/>")
            return
        to = stanza.get("to", "")
        take = self.accounts.get(to) or self.accounts.get(to.partition("/")[0])
        if take is None:
            raise ToolFailure(f"the daemon wrote to {to!r}, whom nobody knows")
        take(stanza)

    def close(self) -> None:
        self._listener.close()
        if self._sock is not None:
            self._sock.close()


class Wire(Protocol):
    """Is told of each stanza of the demo, as it passes."""

    def passes(self, step: int, stanza: Stanza) -> None: ...


DEMO_PROXY, DEMO_USER, DEMO_TARGET = "proxy.example", "user@example/abc", "some-user@example"
SQUARE = "urn:example:square"  # the demo's service: the implementing client squares numbers


def square_request(id_: str, number: int) -> str:
    payload = f"<square xmlns='{SQUARE}' of='{number}'/>"
    return f"<iq type='get' id='{id_}' from='{DEMO_USER}' to='{DEMO_PROXY}'>{payload}</iq>"


class ImplementingClient:
    """An account with several resources, each of which answers requests by squaring a number."""

    def __init__(self, server: DemoServer, resources: tuple[str, ...], wire: Wire) -> None:
        self.served: Counter[str] = Counter({f"{DEMO_TARGET}/{name}": 0 for name in resources})
        self.wrong: list[str] = []
        self._server = server
        self._wire = wire
        server.accounts[DEMO_TARGET] = self._presence
        for jid in self.served:
            server.accounts[jid] = self._request

    def _presence(self, stanza: Stanza) -> None:
        """The component asks to see when resources come and go: granted."""
        if stanza.get("type") == "subscribe":
            self._server.send(f"<presence type='subscribed' from='{DEMO_TARGET}' to='{DEMO_PROXY}'/>")
            for jid in self.served:
                self._server.send(f"<presence from='{jid}' to='{DEMO_PROXY}'/>")

    def _request(self, iq: Stanza) -> None:
        jid, sender, id_ = iq.get("to", ""), iq.get("from", ""), iq.get("id", "")
        number = int(iq[0].get("of", "0"))
        self.served[jid] += 1
        if sender != f"{DEMO_PROXY}/{DEMO_USER}" or iq.get("type") != "get" or iq[0].tag != f"{{{SQUARE}}}square":
            self.wrong.append(f"{jid} was asked {ElementTree.tostring(iq, 'unicode')}")
        self._wire.passes(2, iq)
        answer = (
            f"<iq type='result' id='{id_}' from='{jid}' to='{sender}'>"
            f"<square xmlns='{SQUARE}' of='{number}' is='{number * number}'/></iq>"
        )
        self._wire.passes(3, parsed(answer))
        self._server.send(answer)


class Requester:
    """A user who asks for squares, and looks closely at each answer."""

    def __init__(self, server: DemoServer, wire: Wire) -> None:
        self.asked: dict[str, int] = {}  # id -> number
        self.answered: set[str] = set()
        self.wrong: list[str] = []
        self._server = server
        self._wire = wire
        server.accounts[DEMO_USER] = self._answer

    def ask(self, number: int) -> None:
        id_ = str(1234 + len(self.asked))
        self.asked[id_] = number
        request = square_request(id_, number)
        self._wire.passes(1, parsed(request))
        self._server.send(request)

    def _answer(self, iq: Stanza) -> None:
        self._wire.passes(4, iq)
        id_ = iq.get("id", "")
        number = self.asked.get(id_, 0)
        payload = [(child.tag, child.attrib) for child in iq]
        right = [(f"{{{SQUARE}}}square", {"of": str(number), "is": str(number * number)})]
        addresses = (iq.get("type"), iq.get("from"), iq.get("to"))
        if id_ not in self.asked or addresses != ("result", DEMO_PROXY, DEMO_USER) or payload != right:
            self.wrong.append(f"{DEMO_USER} was answered {ElementTree.tostring(iq, 'unicode')}")
        elif id_ in self.answered:
            self.wrong.append(f"{DEMO_USER} was answered twice: id {id_}")
        self.answered.add(id_)


def parsed(stanza: str) -> Stanza:
    """Return a stanza as the other side sees it."""
    return ElementTree.fromstring(stanza.replace(" ", f" xmlns='{NS_ACCEPT}' ", 1))


class Picture:
    """Three columns and the stanzas that pass between them, drawn as they pass."""

    _NOTES = {
        1: ("chooses a resource, makes the user", "part of the address that asks"),
        3: ("knows the request by id and addresses,", "takes the user out of the address"),
    }

    def __init__(self) -> None:
        terminal = sys.stdout.isatty()
        self._gap = min(max(shutil.get_terminal_size((80, 24)).columns, 80), 110) // 2 - 2
        self._colour = terminal and "NO_COLOR" not in os.environ
        self._pause = 0.3 if terminal else 0.0  # or nobody could watch
        self.detail = 2  # 2: with addresses, 1: a line a stanza, 0: nothing

    def head(self, process: int) -> None:
        """Say who stands in which column."""
        rows = (
            ("user", "component", "implementing client"),
            (DEMO_USER, DEMO_PROXY, DEMO_TARGET),
            ("", f"process {process}", "resources /a and /b"),
        )
        for user, component, client in rows:
            print(f"{user:<{self._gap}} {component}{client:>{self._gap + 2 - len(component)}}")
        self._row("", "")

    def passes(self, step: int, stanza: Stanza) -> None:
        """Draw a stanza: 1 user to component, 2 component to client, 3 and 4 the way back."""
        if not self.detail:
            return
        right, back = step in (2, 3), step > 2
        resource = stanza.get("from" if back else "to", "").partition("/")[2] if right else ""
        name = f"({step}) {stanza.get('type')} id={stanza.get('id')}"
        arrow = self._arrow(name, back, f" /{resource}" if right else "")
        self._draw(right, arrow, self._short_note(step, stanza) if self.detail == 1 else "", "36" if step < 3 else "32")
        if self.detail > 1:
            self._addresses(step, right, stanza)
        sys.stdout.flush()
        time.sleep(self._pause * self.detail)

    def _short_note(self, step: int, stanza: Stanza) -> str:
        if step == 1:
            return f"the square of {stanza[0].get('of')}?"
        return f"{stanza[0].get('is')}" if step == 4 else ""

    def _addresses(self, step: int, right: bool, stanza: Stanza) -> None:
        payload = "".join(f" {key}='{value}'" for key, value in stanza[0].items())
        details = (f"from {stanza.get('from')}", f"to   {stanza.get('to')}", f"<square{payload}/>")
        for detail, note in zip(details, (*self._NOTES.get(step, ("", "")), "")):
            self._draw(right, f"   {detail}", note)

    def _arrow(self, text: str, back: bool, end: str) -> str:
        text = f"{'<' if back else ''}- {text} ".ljust(self._gap - len(end) - (not back), "-")
        return text + ("" if back else ">") + end

    def _draw(self, right: bool, text: str, note: str, colour: str = "") -> None:
        text = text.ljust(self._gap)
        text = f"\x1b[{colour}m{text}\x1b[0m" if colour and self._colour else text
        self._row(*((note.rjust(self._gap - 1), text) if right else (text, f" {note}")))

    def _row(self, left: str, right: str) -> None:
        print(f"|{left:<{self._gap}}|{right:<{self._gap}}|")

    def end(self) -> None:
        """Leave some room below a conversation."""
        self._row("", "")


class Demo:
    """The real daemon between a user and an implementing client, to be watched."""

    SHOWN, BURST, AT_ONCE = 4, 200, 32

    def __init__(self) -> None:
        self._secret = os.urandom(6).hex()
        self._server = DemoServer(DEMO_PROXY, self._secret)
        self._daemon = ToolDaemon(self._configuration())
        self._picture = Picture()
        self._client = ImplementingClient(self._server, ("a", "b"), self._picture)
        self._user = Requester(self._server, self._picture)
        self._seconds = 0.0

    def run(self) -> int:
        """Return 0 if every answer was right."""
        try:
            self._introduce()
            self._converse()
            self._burst()
            return self._summarise(self._stop())
        finally:
            self._daemon.close()
            self._server.close()

    def _configuration(self) -> str:
        server = f"127.0.0.1:{self._server.port}"
        return f"[{DEMO_PROXY}]\ntarget_address = {DEMO_TARGET}\nserver = {server}\nsecret = {self._secret}\n"

    def _introduce(self) -> None:
        print(f"{DEMO_USER} asks the component {DEMO_PROXY} for the squares of numbers.")
        print(f"What answers is a client: two resources of {DEMO_TARGET}, an ordinary account.\n")
        print(f"The XMPP server: in this process, on 127.0.0.1:{self._server.port}")
        print(f"The daemon:      {self._command()}\n\nIts configuration:\n")
        print("".join(f"    {line}\n" for line in self._daemon.file.read_text().splitlines()), flush=True)
        log = self._daemon.log
        if not waited(lambda: log().count(" has come") == 2, self._pump, 15.0):
            raise ToolFailure(f"the daemon did not connect and find both resources; its log:\n{log()}")
        print("Its log:\n")
        for line in log().splitlines():
            text = line.partition(" ")[2].replace("info: ", "").replace(f"{DEMO_PROXY}: ", "")
            print(textwrap.fill(text, 79, initial_indent="    ", subsequent_indent="      "))

    def _command(self) -> str:
        return " ".join([pathlib.Path(sys.executable).name, CLIENTPROXY.name, *self._daemon.command[2:]])

    def _pump(self, timeout: float) -> None:
        self._daemon.check()
        self._server.pump(timeout)

    def _converse(self) -> None:
        print("\nWhat passes between the three:\n")
        self._picture.head(self._daemon.pid)
        for number in range(7, 7 + self.SHOWN):
            self._user.ask(number)
            self._await_answers(0)
            self._picture.end()
            self._picture.detail = 1
        self._picture.detail = 0

    def _await_answers(self, at_most: int) -> None:
        user = self._user
        if not waited(lambda: len(user.asked) - len(user.answered) <= at_most, self._pump, 10.0):
            missing = ", ".join(sorted(user.asked.keys() - user.answered))
            raise ToolFailure(f"not answered within 10 s: {missing}; the daemon's log:\n{self._daemon.log()}")

    def _burst(self) -> None:
        started = time.monotonic()
        for number in range(self.BURST):
            self._user.ask(number)
            self._await_answers(self.AT_ONCE - 1)
        self._await_answers(0)
        self._seconds = time.monotonic() - started

    def _stop(self) -> int:
        """Stop the daemon, and look at what it still sends; return its exit status."""
        self._daemon.process.terminate()
        waited(lambda: self._server.ended, self._server.pump, 10.0)
        return self._daemon.stop()

    def _summarise(self, status: int) -> int:
        user, served = self._user, self._client.served
        sent, wrong = len(user.asked), [*self._client.wrong, *user.wrong]
        print(f"... and {self.BURST} more, {self.AT_ONCE} at a time, in {self._seconds:.2f} s.\n")
        print(f"requests sent {sent:5d}")
        for jid, count in served.items():
            print(f"  served by /{jid.partition('/')[2]} {count:4d}  {'#' * (count * 60 // sent)}")
        print(f"answered      {len(user.answered):5d}\nwrong         {len(wrong):5d}")
        print("".join(f"    {line}\n" for line in wrong[:10]), end="")
        good = not wrong and not status and user.answered == user.asked.keys() and sum(served.values()) == sent
        print(f"\nThe daemon stopped with exit status {status}. {'Every' if good else 'NOT every'} answer was right.")
        return 0 if good else 1


def demo() -> int:
    """Show the real daemon at work; return 0 if every answer was right."""
    return Demo().run()


# ------------------------------------------------------------------------------- load, for bench and growth

LOAD_SECRET, LOAD_TARGET = "secret", b"impl@localhost"


def payload_of(size: int) -> bytes:
    """Return an element of exactly so many bytes, which every library writes as long as it was read."""
    head, tail = b"<query xmlns='urn:example:load'>", b"</query>"
    item = b"<item jid='room.example.org'>A room to talk in</item>"
    items, rest = divmod(size - len(head) - len(tail) - len(b"<end></end>"), len(item))
    if items < 0:
        raise ToolFailure(f"a payload of {size} bytes is too small, 60 is the least")
    return b"%b%b<end>%b</end>%b" % (head, item * items, b"x" * rest, tail)


class LoadLink:
    """The server's end of one component's stream."""

    def __init__(self, sock: socket.socket, component: bytes) -> None:
        self.sock, self.component = sock, component
        self.requests: Iterator[tuple[bytes, bytes]] = iter(())  # id, and the stanza up to its payload
        self.unread = b""
        self.unsent: deque[memoryview] = deque()

    def send(self, data: bytes) -> None:
        """Send what the socket takes, and keep the rest."""
        self.unsent.append(memoryview(data))
        self.flush()

    def flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                rest = self.unsent[0][self.sock.send(self.unsent[0]) :]
                if rest:
                    self.unsent[0] = rest
                else:
                    self.unsent.popleft()


class Load(NamedTuple):
    """What a load has found."""

    wall: float  # s
    cpu: float  # s of this process
    latencies: list[float]  # s, one a round trip, in order of size


class LoadServer:
    """A server that makes load. It must cost less than what it measures: it cuts bytes and parses nothing."""

    _HEADER = re.compile(rb"""<stream:stream[^>]*\sto=["']([^"']+)["'][^>]*>""")
    _HANDSHAKE = re.compile(rb"<handshake[^>]*>([0-9a-f]{40})</handshake>")
    _READ = 1 << 18

    def __init__(self) -> None:
        self.links: list[LoadLink] = []
        self.loaded: list[LoadLink] = []  # those that requests come through
        self.answering = True  # whether the implementing client does
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self._epoll = select.epoll()
        self._by_number: dict[int, LoadLink] = {}
        self._payload, self._pattern = b"", re.compile(b"")
        self._open: dict[bytes, float] = {}  # id -> when it was sent
        self._latencies: list[float] = []
        self._forwarded = self._asked = 0

    def accept(self) -> float:
        """Take a component's connection, check its handshake, accept it; return when that had come."""
        self._listener.settimeout(20)
        sock = self._listener.accept()[0]
        sock.settimeout(20)
        component = self._expect(sock, self._HEADER)
        sock.sendall(STREAM_HEADER.format(component.decode(), "load").encode())
        if self._expect(sock, self._HANDSHAKE).decode() != hashlib.sha1(f"load{LOAD_SECRET}".encode()).hexdigest():
            raise ToolFailure("the handshake is wrong")
        now = time.monotonic()
        sock.sendall(b"<handshake/>")
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.loaded = self.links = [*self.links, LoadLink(sock, component)]
        self._by_number[sock.fileno()] = self.links[-1]
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        return now

    @staticmethod
    def _expect(sock: socket.socket, pattern: re.Pattern[bytes]) -> bytes:
        data = b""
        while True:
            found = pattern.search(data)
            if found:
                return found[1]
            more = sock.recv(65536)
            if not more:
                raise ToolFailure(f"the component closed its stream after {data[-200:]!r}")
            data += more

    def announce(self, resources: int) -> None:
        """Accept the subscription; so many resources of the implementing client come."""
        for link in self.links:
            to = link.component
            come = [b"<presence from='%b/%05d' to='%b'/>" % (LOAD_TARGET, number, to) for number in range(resources)]
            link.send(b"<presence type='subscribed' from='%b' to='%b'/>%b" % (LOAD_TARGET, to, b"".join(come)))

    def churn(self, times: int) -> None:
        """Another resource comes and goes, so many times."""
        for link in self.loaded:
            come = b"<presence from='%b/other' to='%b'/>" % (LOAD_TARGET, link.component)
            link.send(come.join([b"", come.replace(b" ", b" type='unavailable' ", 1)]) * times)

    def load(self, payload: bytes, count: int, in_flight: int, users: int) -> Load:
        """Make so many round trips, or with `answering` off so many requests that stay open."""
        self._prepare(payload, count, users)
        began, cpu = time.perf_counter(), time.process_time()
        for number in range(min(in_flight, count)):
            self._ask(self.loaded[number % len(self.loaded)], began)
        while (len(self._latencies) if self.answering else self._forwarded) < count:
            ready = self._epoll.poll(20)
            if not ready:
                raise ToolFailure(f"nothing for 20 s, {len(self._latencies)} of {count} requests are answered")
            for number, event in ready:
                self._turn(self._by_number[number], event)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        return Load(wall, cpu, sorted(self._latencies))

    def _prepare(self, payload: bytes, count: int, users: int) -> None:
        """Make everything that need not be made while the clock runs."""
        self._payload = payload + b"</iq>"
        head = rb"""<iq type="(get|result)" id="([^"]*)" from="([^"]*)" to="([^"]*)">"""
        self._pattern = re.compile(head + rb"(?s:.{%d})</iq>" % len(payload))
        self._latencies, self._forwarded = [], 0
        for place, link in enumerate(self.loaded):
            numbers = range(self._asked + place, self._asked + count, len(self.loaded))
            link.requests = iter([self._request(link.component, number, users) for number in numbers])
        self._asked += count

    @staticmethod
    def _request(component: bytes, number: int, users: int) -> tuple[bytes, bytes]:
        user = int(random.random() * users)
        head = b"<iq type='get' id='%d' from='user%07d@localhost/abc' to='%b'>" % (number, user, component)
        return b"%d" % number, head

    def _ask(self, link: LoadLink, now: float) -> None:
        for id_, head in itertools.islice(link.requests, 1):
            self._open[id_] = now
            link.send(head + self._payload)

    def _turn(self, link: LoadLink, event: int) -> None:
        """Handle an event of one link: all that has come, in one go."""
        if event & select.EPOLLOUT:
            link.flush()
        if event & select.EPOLLIN:
            data = link.sock.recv(self._READ)
            if not data:
                raise ToolFailure(f"the component closed its stream; its last bytes: {link.unread[-300:]!r}")
            self._serve(link, link.unread + data)
        waiting = select.EPOLLOUT if link.unsent else 0
        if waiting or event & select.EPOLLOUT:
            self._epoll.modify(link.sock.fileno(), select.EPOLLIN | waiting)

    def _serve(self, link: LoadLink, data: bytes) -> None:
        """Answer what has been forwarded, take answers, and send a new request for each."""
        now, payload = time.perf_counter(), self._payload
        end = data.rfind(b"</iq>") + 5
        link.unread = data[end:] if end >= 5 else data
        out: list[bytes] = []
        for kind, id_, sender, to in self._pattern.findall(data, 0, max(end, 0)):
            if kind == b"result":
                self._latencies.append(now - self._open.pop(id_))  # KeyError: answered twice
            else:
                self._forwarded += 1
                if self.answering:
                    out += (b"<iq type='result' id='%b' from='%b' to='%b'>" % (id_, to, sender), payload)
                    continue
            for next_id, head in itertools.islice(link.requests, 1):
                self._open[next_id] = now
                out += (head, payload)
        if out:
            link.send(b"".join(out))

    def forget(self) -> None:
        """What is open stays open."""
        self._open.clear()

    def close(self) -> None:
        for sock in (self._listener, *(link.sock for link in self.links)):
            sock.close()
        self._epoll.close()


# The proxy as one writes it with slixmpp. `iq.send()` is its documented way to send an IQ, and keeps a table of
# open requests with timeouts; `self.send(iq)` does not.
SLIXMPP_PROXY = '''
import random, sys
from slixmpp.componentxmpp import ComponentXMPP
from slixmpp.xmlstream.handler import Callback
from slixmpp.xmlstream.matcher import StanzaPath

class Proxy(ComponentXMPP):
    def __init__(self, jid, secret, port, target):
        super().__init__(jid, secret, "127.0.0.1", port)
        self.target, self.resources = target, []
        self.add_event_handler("session_start", self.start)
        self.add_event_handler("presence_available", self.available)
        self.register_handler(Callback("proxy", StanzaPath("iq"), self.forward))

    async def start(self, event):
        self.send_presence(ptype="subscribe", pto=self.target, pfrom=self.boundjid.bare)

    def available(self, presence):
        if presence["from"].bare == self.target:
            self.resources.append(presence["from"].full)

    def forward(self, iq):
        if iq["from"].bare == self.target:
            iq["to"], iq["from"] = iq["to"].resource, self.boundjid.bare
        else:
            iq["from"], iq["to"] = f"{self.boundjid.bare}/{iq['from']}", random.choice(self.resources)
        iq.send()

proxy = Proxy(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
proxy.connect()
proxy.loop.run_forever()
'''


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of all threads of a process, user and system (the kernel's schedstats)."""
    tasks = pathlib.Path(f"/proc/{pid}/task")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


def resident(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


class Figure(NamedTuple):
    """A measurement; times of the proxy's process, per round trip."""

    cpu: float  # µs
    rate: float  # round trips a second
    p50: float  # ms
    p99: float
    busy: float  # share of a CPU that the proxy had
    load: float  # the same of the load server


class Subject:
    """A proxy to be measured: its process, and a load server for it."""

    def __init__(self, peer: str = "", keys: str = "", components: int = 1, resources: int = 2) -> None:
        """peer: '' for the daemon, or the source of another program; keys: lines for the configuration."""
        self.server = LoadServer()
        target = LOAD_TARGET.decode()
        head = f"[DEFAULT]\ntarget_address = {target}\nserver = 127.0.0.1:{self.server.port}\nsecret = {LOAD_SECRET}\n"
        names = [f"proxy{number}.localhost" for number in range(components)]
        command = (sys.executable, "-c", peer, names[0], LOAD_SECRET, str(self.server.port), target) if peer else ()
        sections = "".join(f"[{name}]\n" for name in names)
        self.process = ToolDaemon(f"[clientproxy]\nlog_level = warning\n{head}{keys}\n{sections}", command)
        try:
            self.handshake = max(self.server.accept() for _ in names) - self.process.started  # s
            self.server.announce(resources)
        except (OSError, ToolFailure) as error:
            self.close()
            raise ToolFailure(f"no handshake: {error}; the log:\n{self.process.log()}") from None
        time.sleep(1.0)  # slixmpp asks for presence only now
        self.idle = self.memory()

    def memory(self) -> float:
        return resident(self.process.pid)

    def measure(self, payload: bytes, in_flight: int, seconds: float, users: int = 50) -> Figure:
        """Measure for about so many seconds."""
        warm = self.load(payload, max(in_flight, 20), in_flight, users)
        if warm.wall < seconds / 5:  # a fast one: more, to warm up and to know its rate better
            warm = self.load(payload, int(len(warm.latencies) / warm.wall * seconds / 5) + 1, in_flight, users)
        count = max(int(len(warm.latencies) / warm.wall * seconds), in_flight + in_flight // 2)
        before = cpu_seconds(self.process.pid)
        wall, mine, latencies = self.load(payload, count, in_flight, users)
        cpu = cpu_seconds(self.process.pid) - before
        p50, p99 = (latencies[int(part * count)] * 1e3 for part in (0.5, 0.99))
        return Figure(cpu / count * 1e6, count / wall, p50, p99, cpu / wall, mine / wall)

    def load(self, payload: bytes, count: int, in_flight: int, users: int) -> Load:
        try:
            return self.server.load(payload, count, in_flight, users)
        except (OSError, ToolFailure, KeyError) as error:
            raise ToolFailure(f"{error!r}; the log:\n{self.process.log()}") from None

    def close(self) -> None:
        self.process.close()
        self.server.close()


def floor(argv: list[str]) -> int:
    """Print the CPU time in µs that lxml's pull parser needs for a round trip: floor PAYLOAD IN_FLIGHT SECONDS."""
    from lxml import etree

    payload, in_flight, seconds = payload_of(int(argv[0])), int(argv[1]), float(argv[2])
    pieces = floor_bytes(payload, in_flight)
    parser: Any = etree.XMLPullParser(("end",), tag=f"{{{NS_ACCEPT}}}iq", collect_ids=False, huge_tree=True)
    parser.feed(STREAM_HEADER.format("proxy0.localhost", "floor").encode() + b"<iq/>")
    root = next(iter(parser.read_events()))[1].getparent()
    rounds, began = 0, time.process_time()
    while time.process_time() < began + seconds:
        rounds += 1
        for piece in pieces:
            root[-1].tail = None
            parser.feed(piece)
            for _ in parser.read_events():
                pass
            del root[:-1]
    print((time.process_time() - began) / rounds / FLOOR_ROUND_TRIPS * 1e6)
    return 0


FLOOR_ROUND_TRIPS = 512


def floor_bytes(payload: bytes, in_flight: int) -> list[bytes]:
    """Return what the daemon would read for some round trips, in pieces that it would read it in at best."""
    stanzas = []
    for number in range(FLOOR_ROUND_TRIPS):
        request = LoadServer._request(b"proxy0.localhost", number, 50)[1]
        found = re.search(rb"from='([^']*)' to='([^']*)'", request)
        assert found is not None
        stanzas.append(b"%b%b</iq>" % (request, payload))
        answer = (number, LOAD_TARGET, number % 2, found[2], found[1], payload)
        stanzas.append(b"<iq type='result' id='%d' from='%b/%05d' to='%b/%b'>%b</iq>" % answer)
    batches = (b"".join(stanzas[i : i + in_flight]) for i in range(0, len(stanzas), in_flight))
    return [batch[i : i + 65536] for batch in batches for i in range(0, len(batch), 65536)]


# ------------------------------------------------------------------------------------------------ bench


class BenchOptions(NamedTuple):
    """What is measured, and for how long."""

    rounds: int
    seconds: float  # a measurement
    payloads: list[int]
    windows: list[int]
    slixmpp: bool


def bench_options(argv: list[str]) -> BenchOptions:
    parser = argparse.ArgumentParser(prog="bench", description="CPU time per round trip, ours and others'")
    parser.add_argument("--quick", action="store_true", help="half a minute instead of three")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0, help="of each measurement")
    parser.add_argument("--payloads", default="150,4096,65536", help="bytes")
    parser.add_argument("--windows", default="1,32,512", help="requests in flight")
    given = parser.parse_args(argv)
    payloads, windows = ([int(number) for number in text.split(",")] for text in (given.payloads, given.windows))
    have = importlib.util.find_spec("slixmpp") is not None
    if not have:
        print(f"{sys.executable} has no slixmpp: without it (pip install slixmpp)", file=sys.stderr)
    rounds, seconds = given.rounds or (2 if given.quick else 5), given.seconds or (0.2 if given.quick else 0.6)
    return BenchOptions(rounds, seconds, payloads, windows, have)


class Bench:
    """The daemon, slixmpp and the parser alone, in turn, over several rounds."""

    def __init__(self, options: BenchOptions) -> None:
        self._options = options
        self._combinations = [(payload, window) for payload in options.payloads for window in options.windows]
        self._figures: dict[tuple[str, int, int], list[Figure]] = defaultdict(list)
        self._floor: dict[tuple[int, int], list[float]] = defaultdict(list)
        self._handshakes: dict[str, list[float]] = defaultdict(list)
        self._memory: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def run(self) -> int:
        began = time.monotonic()
        for number in range(self._options.rounds):
            progress(f"round {number + 1} of {self._options.rounds}")
            self._round(number)
        progress("")
        self._print()
        print(f"\n{time.monotonic() - began:.0f} s")
        return 0

    def _round(self, number: int) -> None:
        names = ["clientproxy", *(["slixmpp"] if self._options.slixmpp else [])]
        names = names[:: -1 if number % 2 else 1]
        with contextlib.ExitStack() as stack:
            subjects = {name: Subject(SLIXMPP_PROXY if name == "slixmpp" else "") for name in names}
            for subject in subjects.values():
                stack.callback(subject.close)
            for payload, window in self._combinations:
                for name, subject in subjects.items():
                    if not self._takes_too_long(name, payload, window):
                        figure = subject.measure(payload_of(payload), window, self._options.seconds)
                        self._figures[name, payload, window].append(figure)
                self._floor[payload, window].append(self._measure_floor(payload, window))
            for name, subject in subjects.items():
                self._handshakes[name].append(subject.handshake)
                self._memory[name].append((subject.idle, subject.memory()))

    def _takes_too_long(self, name: str, payload: int, window: int) -> bool:
        """Whether a window of slixmpp's would take more than seconds, by what a smaller one has shown."""
        fewer = [self._figures[name, payload, w] for w in self._options.windows if w < window]
        return name == "slixmpp" and any(figures[0].cpu / 1e6 * 2 * window > 4.0 for figures in fewer if figures)

    def _measure_floor(self, payload: int, window: int) -> float:
        seconds = str(self._options.seconds / 2)
        command = [sys.executable, __file__, "floor", str(payload), str(window), seconds]
        return float(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    # -- the tables

    def _print(self) -> None:
        self._print_head()
        self._print_cpu()
        self._print_rates()
        print(f"\n{'':12}  resident memory, MiB: idle, after all this   start to handshake, ms")
        for name, memory in self._memory.items():
            idle, after = (statistics.median(column) for column in zip(*memory))
            handshakes = self._handshakes[name]
            print(f"{name:12}{idle:24.1f}{after:16.1f}{min(handshakes) * 1e3:14.0f} min"
                  f"{statistics.median(handshakes) * 1e3:6.0f} median")

    def _print_head(self) -> None:
        print(f"{versions()}; rounds: {self._options.rounds} of {self._options.seconds:g} s, interleaved.")
        print("A round trip is a request in and out and its answer in and out. Compare ratios: other jobs disturb.\n")

    def _print_cpu(self) -> None:
        print("CPU time of the process per round trip in µs, user and system, all threads: minimum and median; and")
        print("the median of the rounds' ratios (-: not measured, as it takes too long)\n")
        print(f"{'payload':>8}{'in flight':>10}{'clientproxy':>19}{'slixmpp':>19}{'parser alone':>19}"
              f"{'to slixmpp':>14}{'to parser':>11}")
        for payload, window in self._combinations:
            ours = [figure.cpu for figure in self._figures["clientproxy", payload, window]]
            theirs = [figure.cpu for figure in self._figures["slixmpp", payload, window]]
            floor = self._floor[payload, window]
            times = [their / our for our, their in zip(ours, theirs)]
            to_slixmpp = f"1/{statistics.median(times):.1f}" if times else "-"
            to_floor = statistics.median(our / low for our, low in zip(ours, floor))
            print(f"{payload:8d}{window:10d}{low_and_middle(ours)}{low_and_middle(theirs)}{low_and_middle(floor)}"
                  f"{to_slixmpp:>14}{to_floor:11.2f}")

    def _print_rates(self) -> None:
        names = list(self._memory)
        print("\nMedians: round trips a second; answer time in ms, p50 and p99; share of a CPU that the proxy had, and")
        print("the load server beside it\n")
        columns = "".join(f"{name:>16}{'p50':>8}{'p99':>8}{'busy':>6}{'load':>6}" for name in names)
        print(f"{'payload':>8}{'in flight':>10}{columns}")
        for payload, window in self._combinations:
            rates = "".join(self._rate(self._figures[name, payload, window]) for name in names)
            print(f"{payload:8d}{window:10d}{rates}")

    @staticmethod
    def _rate(figures: list[Figure]) -> str:
        if not figures:
            return f"{'-':>16}"
        _, rate, p50, p99, busy, load = (statistics.median(column) for column in zip(*figures))
        return f"{rate:16.0f}{p50:8.2f}{p99:8.2f}{busy:6.0%}{load:6.0%}"


def low_and_middle(values: list[float]) -> str:
    """Return minimum and median, in 19 characters."""
    if not values:
        return f"{'-':>19}"
    digits = 1 if min(values) < 1000 else 0
    return f"{min(values):10.{digits}f}{statistics.median(values):9.{digits}f}"


def versions() -> str:
    from lxml import etree

    parts = [f"Python {platform.python_version()}", f"lxml {etree.__version__}"]
    parts.append("libxml2 " + ".".join(map(str, etree.LIBXML_VERSION)))
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        parts.append(f"slixmpp {importlib.metadata.version('slixmpp')}")
    return ", ".join([*parts, f"{os.cpu_count()} CPUs"])


def progress(text: str) -> None:
    """Say on a terminal how far it has come."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}", end="" if text else "\r", file=sys.stderr, flush=True)


def bench(argv: list[str]) -> int:
    """Measure the daemon, side by side with slixmpp and with the parser alone."""
    return Bench(bench_options(argv)).run()


# ----------------------------------------------------------------------------------------------- growth

GROWTH_OPEN = 100_000


class Variant(NamedTuple):
    """One way to load a daemon, to be compared with the first of its group."""

    group: str
    name: str
    policy: str = "random"
    resources: int = 2
    users: int = 50
    components: int = 1
    loaded: int = 1  # components that requests come through
    in_flight: int = 512
    open: int = 0  # requests that are open all the time


def growth_variants(in_flight: int) -> list[Variant]:
    few = max(in_flight // 100, 1)
    on_one, on_each = f"components, {in_flight} in flight on one", f"components, {few} in flight on each"
    same = Variant("", "", in_flight=in_flight)
    return [
        *(same._replace(group="resources, policy random", name=f"{n:,}", resources=n) for n in (1, 100, 10_000)),
        *(same._replace(group="resources, policy round-robin", name=f"{n:,}", policy="round-robin", resources=n)
          for n in (1, 100, 10_000)),
        *(same._replace(group="different requesters", name=f"{n:,}", users=n) for n in (10, 10_000, 1_000_000)),
        *(same._replace(group="other open requests", name=f"{n:,}", open=n) for n in (0, GROWTH_OPEN)),
        *(same._replace(group=on_one, name=str(n), components=n) for n in (1, 100)),
        *(Variant(on_each, str(n), components=n, loaded=n, in_flight=n * few) for n in (1, 100)),
    ]  # fmt: skip


class Growth:
    """What a round trip costs as the numbers around it grow."""

    PAYLOAD = payload_of(150)

    def __init__(self, rounds: int, seconds: float, in_flight: int) -> None:
        self._rounds = rounds
        self._seconds = seconds
        self._variants = growth_variants(in_flight)
        self._subjects: dict[Variant, Subject] = {}
        self._cpu: dict[Variant, list[float]] = defaultdict(list)
        self._churn: dict[int, list[float]] = defaultdict(list)  # by open requests
        self._per_request: dict[int, float] = {}  # bytes, by the users that they belong to

    def run(self) -> int:
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            for variant in self._variants:
                progress(f"{variant.group}: {variant.name}")
                self._subjects[variant] = stack.enter_context(contextlib.closing(self._start(variant)))
            for number in range(self._rounds):
                for variant in self._variants[:: -1 if number % 2 else 1]:
                    progress(f"round {number + 1} of {self._rounds}, {variant.group}: {variant.name}")
                    self._measure(variant, self._subjects[variant])
        self._weigh(GROWTH_OPEN)
        progress("")
        self._print(time.monotonic() - began)
        return 0

    def _start(self, variant: Variant) -> Subject:
        keys = f"policy = {variant.policy}\ntimeout = 86400\nmax_pending = 1000000\nmax_pending_per_user = 1000000\n"
        subject = Subject("", keys, variant.components, variant.resources)
        subject.server.loaded = subject.server.links[: variant.loaded]
        if variant.open:
            self._open(subject, variant.open, 1000)
        return subject

    def _open(self, subject: Subject, count: int, users: int) -> None:
        """Make requests that stay open."""
        before = subject.memory()
        subject.server.answering = False
        subject.load(self.PAYLOAD, count, 512, users)
        subject.server.answering = True
        self._per_request[users] = (subject.memory() - before) * (1 << 20) / count

    def _weigh(self, count: int) -> None:
        """Measure the memory of open requests that are all of different users."""
        with contextlib.closing(self._start(Variant("", ""))) as subject:
            self._open(subject, count, 100 * count)

    def _measure(self, variant: Variant, subject: Subject) -> None:
        figure = subject.measure(self.PAYLOAD, variant.in_flight, self._seconds, variant.users)
        self._cpu[variant].append(figure.cpu)
        if variant.group == "other open requests":
            before = cpu_seconds(subject.process.pid)
            subject.server.churn(2000)
            subject.load(self.PAYLOAD, 1, 1, 1)  # its answer says that all presence has been handled
            self._churn[variant.open].append((cpu_seconds(subject.process.pid) - before) / 4000 * 1e6)

    def _print(self, seconds: float) -> None:
        print(f"{versions()}; rounds: {self._rounds} of {self._seconds:g} s, interleaved.")
        print("CPU time of the daemon per round trip in µs, payloads of 150 bytes; the ratio is the median of the")
        print("rounds' ratios to the first of the group. Compare ratios: other jobs disturb.\n")
        print(f"{'':40}{'in flight':>10}{'minimum':>10}{'median':>10}{'ratio':>8}")
        group = ""
        for variant in self._variants:
            if variant.group != group:
                group, first = variant.group, self._cpu[variant]
                print(group)
            self._print_line(variant.name, f"{variant.in_flight}", self._cpu[variant], first)
        self._print_rest()
        print(f"\n{seconds:.0f} s")

    @staticmethod
    def _print_line(name: str, in_flight: str, cpu: list[float], first: list[float]) -> None:
        ratio = statistics.median(mine / other for mine, other in zip(cpu, first))
        print(f"{name:>40}{in_flight:>10}{min(cpu):10.1f}{statistics.median(cpu):10.1f}{ratio:8.2f}")

    def _print_rest(self) -> None:
        print("presence of another resource, a stanza (other open requests)")
        for count, cpu in self._churn.items():
            self._print_line(f"{count:,}", "", cpu, self._churn[0])
        print("timeout of one request, in the core alone (other open requests)")
        costs = {count: [time_timeouts(count) for _ in range(self._rounds)] for count in (0, GROWTH_OPEN)}
        for count, cpu in costs.items():
            self._print_line(f"{count:,}", "", cpu, costs[0])
        print(f"\nMemory of an open request, with {GROWTH_OPEN:,} of them:")
        for users, size in self._per_request.items():
            print(f"{size:.0f} bytes where they are of {min(users, GROWTH_OPEN):,} users")


def time_timeouts(others: int) -> float:
    """Return the CPU time in µs of a timeout, each at a moment of its own, with other requests open."""
    from clientproxy import OpenRequests, Request, Resource

    resource, overdue = Resource("impl@localhost/a", 0.0), 1000
    requests = OpenRequests(30.0, 10 * GROWTH_OPEN, 10 * GROWTH_OPEN)
    for number in range(overdue + others):
        user = f"user{number % 1000}@localhost"
        request = Request(f"{user}/abc", "proxy.localhost", resource.jid, str(number), user, number / 1000, resource)
        requests.add((f"proxy.localhost/{user}/abc", str(number)), request)
    began = time.process_time()
    taken = sum(len(requests.take_overdue(30.0 + number / 1000)) for number in range(overdue))
    if not overdue <= taken <= overdue + 1:
        raise ToolFailure(f"{taken} of {overdue} requests have timed out")
    return (time.process_time() - began) / overdue * 1e6


def growth(argv: list[str]) -> int:
    """Measure how the cost of a round trip depends on the numbers around it."""
    parser = argparse.ArgumentParser(prog="growth", description="CPU time per round trip as the numbers grow")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0, help="of each measurement")
    parser.add_argument("--in-flight", type=int, default=512)
    given = parser.parse_args(argv)
    rounds, seconds = given.rounds or (2 if given.quick else 7), given.seconds or (0.3 if given.quick else 1.0)
    return Growth(rounds, seconds, given.in_flight).run()


# ------------------------------------------------------------------------------------------------- soak

SOAK_GROWTH = 4.0  # MiB that the daemon's memory may grow by, from the third tenth of the run to the last


class Soak(LoadServer):
    """A server with all kinds of traffic at once: every request is counted until its one answer has come."""

    _HEAD = re.compile(
        rb"""<iq type=["'](get|result|error)["'] id=["']([^"']*)["'] from=["']([^"']*)["'] to=["']([^"']*)["']"""
    )
    _PAYLOAD = b"<query xmlns='http://jabber.org/protocol/disco#info' node='soak'/>"
    _ERROR = b"<error type='cancel'><%b xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.owed: dict[bytes, int] = {}  # id -> answers to come
        self.figures: Counter[str] = Counter()
        self.sent = 0  # stanzas
        self._rand = random.Random(seed)
        self._present = [b"%b/r%d" % (LOAD_TARGET, number) for number in range(8)]
        self._away: list[bytes] = []
        self._users = [b"user%d@localhost/home" % number for number in range(5000)]

    # -- what is sent

    def send(self, stanzas: list[bytes]) -> None:
        self.sent += len(stanzas)
        self.links[0].send(b"".join(stanzas))

    def presence(self, jid: bytes, kind: bytes = b"") -> bytes:
        return b"<presence%b from='%b' to='%b'/>" % (kind and b" type='%b'" % kind, jid, self.links[0].component)

    def everyone(self) -> list[bytes]:
        """Return what a probe is answered with."""
        return [self.presence(jid) for jid in self._present]

    def requests(self, count: int) -> list[bytes]:
        """Return stanzas of users, most of them ordinary requests."""
        kinds = self._rand.choices(list(self._KINDS), [weight for _, weight in self._KINDS.values()], k=count)
        return [self._KINDS[kind][0](self, kind) for kind in kinds]

    def _ordinary(self, kind: str, payload: bytes = _PAYLOAD) -> bytes:
        self._asked += 1
        id_ = b"%d" % self._asked
        self.owed[id_] = 1
        return self._iq(kind, b"get", id_, payload)

    def _user(self) -> bytes:
        return self._users[int(self._rand.random() * len(self._users))]

    def _iq(self, kind: str, type_: bytes, id_: bytes, payload: bytes) -> bytes:
        self.figures[kind] += 1
        return self._stanza(type_, id_, self._user(), self.links[0].component, payload)

    def _again(self, kind: str) -> bytes:
        """The same id twice at once: one of the two is refused."""
        first = self._ordinary(kind)
        self.owed[b"%d" % self._asked] = 2
        self.sent += 1
        return first + first

    def _new_names(self, kind: str) -> bytes:
        name = b"n%x" % self._rand.getrandbits(60)
        return self._ordinary(kind, b"<%b xmlns='urn:%b' a%b='1'/>" % (name, name, name))

    def _two_payloads(self, kind: str) -> bytes:
        return self._ordinary(kind, self._PAYLOAD + self._PAYLOAD)

    def _message(self, kind: str) -> bytes:
        self.figures[kind] += 1
        to = self.links[0].component
        return b"<message from='%b' to='%b'><body>hello</body></message>" % (self._user(), to)

    def _stray(self, kind: str) -> bytes:
        return self._iq(kind, b"result", b"stray", b"")

    def _subscribe(self, kind: str) -> bytes:
        self.figures[kind] += 1
        return self.presence(self._user(), b"subscribe")

    def _churn(self, kind: str) -> bytes:
        """A resource goes, with what it has open; or one comes back."""
        self.figures[kind] += 1
        if self._away and (len(self._present) < 4 or self._rand.random() < 0.5):
            self._present.append(self._away.pop(0))
            return self.presence(self._present[-1])
        self._away.append(self._present.pop(self._rand.randrange(len(self._present))))
        return self.presence(self._away[-1], b"unavailable")

    _KINDS: ClassVar[dict[str, tuple[Callable[[Soak, str], bytes], float]]] = {  # with weights
        "requests": (_ordinary, 1.0),
        "requests with an id that is open": (_again, 0.01),
        "requests with two payloads": (_two_payloads, 0.01),
        "requests with names never seen": (_new_names, 0.001),
        "messages": (_message, 0.02),
        "answers to nothing": (_stray, 0.01),
        "subscriptions of users": (_subscribe, 0.01),
        "resources that come and go": (_churn, 0.001),
    }

    # -- what comes back

    def _serve(self, link: LoadLink, data: bytes) -> None:
        end = data.rfind(b">") + 1
        link.unread, data = data[end:], data[:end]
        out = [answer for _ in range(data.count(b"'probe'")) for answer in self.everyone()]
        for kind, id_, sender, to in self._HEAD.findall(data):
            if kind == b"get":
                out += self._answer(id_, to, sender)
            elif id_ in self.owed:
                self.figures["answers" if kind == b"result" else "errors"] += 1
                self.owed[id_] -= 1
                if not self.owed[id_]:
                    del self.owed[id_]
            else:
                raise ToolFailure(f"an answer that nobody waits for: id {id_.decode()} to {to.decode()}")
        if out:
            self.send(out)

    def _answer(self, id_: bytes, resource: bytes, to: bytes) -> list[bytes]:
        """Return what a resource does with a request: nearly always it answers."""
        chance = self._rand.random()
        answer = self._stanza(b"result", id_, resource, to, self._PAYLOAD)
        if chance < 0.95:
            return [answer]
        if chance < 0.97:
            return [self._stanza(b"error", id_, resource, to, self._ERROR % b"item-not-found")]
        if chance < 0.975:
            return [self._stanza(b"error", id_, resource, to, self._ERROR % b"service-unavailable")]
        if chance < 0.985:
            return [answer, answer]
        if chance < 0.995:
            return [self._stanza(b"result", id_, LOAD_TARGET + b"/stranger", to, b""), answer]
        self.figures["requests left unanswered"] += 1
        return []

    @staticmethod
    def _stanza(kind: bytes, id_: bytes, from_: bytes, to: bytes, payload: bytes) -> bytes:
        return b"<iq type='%b' id='%b' from='%b' to='%b'>%b</iq>" % (kind, id_, from_, to, payload)

    def turn(self, timeout: float) -> None:
        for number, event in self._epoll.poll(timeout):
            self._turn(self._by_number[number], event)


class SoakRun:
    """The daemon under a Soak, its memory looked at a hundred times."""

    IN_FLIGHT, BATCH = 400, 100

    def __init__(self, stanzas: int, seed: int) -> None:
        self._stanzas = stanzas
        self._server = Soak(seed)
        self._daemon = ToolDaemon(
            f"[proxy.localhost]\ntarget_address = {LOAD_TARGET.decode()}\nserver = 127.0.0.1:{self._server.port}\n"
            f"secret = {LOAD_SECRET}\ntimeout = 1\npolicy = least-outstanding\n"
        )
        self._memory: list[float] = []

    def run(self) -> int:
        try:
            self._server.accept()
            self._server.send([self._server.presence(LOAD_TARGET, b"subscribed"), *self._server.everyone()])
            began = time.monotonic()
            while self._server.sent < self._stanzas:
                self._feed(self._server.sent * 100 // self._stanzas, began)
            self._settle()
            return self._judge()
        except (OSError, ToolFailure) as error:
            raise ToolFailure(f"{error}; the daemon's log:\n{self._daemon.log()[-2000:]}") from None
        finally:
            self._daemon.close()
            self._server.close()

    def _feed(self, percent: int, began: float) -> None:
        """Keep enough requests under way, for some stanzas."""
        if len(self._memory) <= percent:
            self._memory.append(resident(self._daemon.pid))
            if percent % 5 == 0:
                self._report(time.monotonic() - began)
        for _ in range(10):
            if len(self._server.owed) < self.IN_FLIGHT:
                self._server.send(self._server.requests(self.BATCH))
            self._server.turn(5.0)

    def _report(self, seconds: float) -> None:
        sent, owed = self._server.sent, len(self._server.owed)
        print(f"{sent:12,d} stanzas {seconds:7.0f} s {self._memory[-1]:8.1f} MiB {owed:6d} requests open", flush=True)

    def _settle(self) -> None:
        """All that is open must be answered now, timeouts included."""
        end = time.monotonic() + 10
        while self._server.owed and time.monotonic() < end:
            self._server.turn(0.2)

    def _judge(self) -> int:
        owed, log = len(self._server.owed), self._daemon.log()
        tenth = len(self._memory) // 10
        early = statistics.median(self._memory[2 * tenth : 3 * tenth + 1])
        late = statistics.median(self._memory[-tenth - 1 :])
        status = self._daemon.stop()
        print()
        for name, count in self._server.figures.most_common():
            print(f"{count:12,d} {name}")
        print(f"\n{self._server.sent:,} stanzas sent to the daemon; unanswered requests: {owed}; exit status {status}")
        print(f"memory: {early:.1f} MiB in the third tenth of the run, {late:.1f} in the last; limit +{SOAK_GROWTH:g}")
        good = not owed and not status and late - early <= SOAK_GROWTH and "Traceback" not in log
        print("good" if good else f"NOT good; the daemon's log:\n{log[-2000:]}")
        return 0 if good else 1


def soak(argv: list[str]) -> int:
    """Send millions of stanzas of all kinds through the daemon; fail unless its memory stays flat."""
    parser = argparse.ArgumentParser(prog="soak", description="millions of stanzas through the daemon in flat memory")
    parser.add_argument("stanzas", type=int, nargs="?", default=10_000_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = parser.parse_args(argv)
    print(f"soak {given.stanzas} --seed {given.seed}", flush=True)
    return SoakRun(given.stanzas, given.seed).run()


# ---------------------------------------------------------------- what a real server needs beside the daemon


def servers(argv: list[str]) -> int:
    """Print what a request through a real server costs that, and what it costs the daemon."""
    parser = argparse.ArgumentParser(prog="servers", description="CPU time of a real server and of the daemon")
    parser.add_argument("requests", type=int, nargs="?", default=4000, help="default: %(default)s")
    parser.add_argument("--in-flight", type=int, default=64)
    given = parser.parse_args(argv)
    print(f"CPU time per request, of {given.requests} with {given.in_flight} in flight, one user, one resource")
    for server_class in (Prosody, Ejabberd):
        if server_class.available():
            with contextlib.closing(server_class()) as server:
                of_server, of_daemon = measure_server(server, given.requests, given.in_flight)
            share = of_daemon / (of_server + of_daemon)
            print(f"{server.name:10}{of_server:6.0f} µs, the daemon {of_daemon:4.0f} µs: {share:.0%} of both")
        else:
            print(f"{server_class.name:10}is not installed")
    return 0


def measure_server(server: RealServer, requests: int, in_flight: int) -> tuple[float, float]:
    """Return the CPU time in µs that a request costs the server, and the daemon."""
    server.start({PROXY: "secret"})
    for user in ("impl", "alice"):
        server.register(user)
    with contextlib.ExitStack() as cleanup:
        impl = Client(server, "impl", "a", accept=True).serve().presence()
        alice = Client(server, "alice")
        daemon = RunningDaemon({PROXY: {"target_address": impl.bare, "secret": "secret",
                                        "server": f"127.0.0.1:{server.component_port}"}})  # fmt: skip
        for each in (impl, alice, daemon):
            cleanup.callback(each.close)
        until(lambda: answered(alice.iq(PROXY)) == "result a", what="an answer")
        alice.load(PROXY, requests // 4, in_flight)  # what comes first is dearer
        assert server.process is not None
        pids = (server.process.pid, daemon.process.pid)
        before = [cpu_seconds(pid) for pid in pids]
        tally = alice.load(PROXY, requests, in_flight)
        after = [cpu_seconds(pid) for pid in pids]
    if tally["result a"] != requests:
        raise ToolFailure(f"{server.name}: not every request was served: {dict(tally)}")
    of_server, of_daemon = ((end - begin) / requests * 1e6 for begin, end in zip(before, after))
    return of_server, of_daemon


# ---------------------------------------------------------------- random streams: fuzz and parser-random

NS_URIS = (NS_ACCEPT, "jabber:client", "http://etherx.jabber.org/streams", "urn:a", "urn:b", "")
TEXTS = (
    "a", "b c", "&amp;", "&lt;", "&gt;", ">", "&quot;", "&apos;", "&#9;", "&#xA;", "&#13;", "\n", "é", "€", "]]", "-->",
    "\N{MUSICAL SYMBOL G CLEF}",
)  # fmt: skip
FAULTS = (
    "<!-- c -->", "<?pi x?>", "<!DOCTYPE a>", "&undefined;", "&#0;", "&#xD800;", "&", "<", "</iq>", "<a", "]]>", "\x00",
    "\x1f", "<other/>", "<x:y/>", "<iq><iq/></iq>", "<![CDATA[<&]]>", "<stream:error/>", "</stream:stream>",
    "<a b='1' b='2'/>",
)  # fmt: skip


TOP_LEVEL = re.compile(
    r"\{jabber:(component:accept|client)\}(iq|message|presence)"
    r"|\{jabber:component:accept\}handshake|\{http://etherx.jabber.org/streams\}(error|features)"
)


class StreamMaker:
    """Random streams as a server could write them: right ones, and ones with something wrong."""

    def __init__(self, rand: random.Random) -> None:
        self._rand = rand

    def stream(self) -> bytes:
        """Return a stream that is in order; it need not have ended."""
        stanzas = [self._stanza() + self._rand.choice(("", "", " ", "\n")) for _ in range(self._rand.randrange(6))]
        end = self._rand.choice(("", "", "</stream:stream>"))
        return (self._header() + "".join(stanzas) + end).encode()

    def spoilt(self) -> bytes:
        """Return a stream with something cut out, doubled, exchanged or put in, mostly behind its header."""
        good, rand = self.stream(), self._rand
        begin = header_length(good) if rand.random() < 0.8 else 0
        at, length = rand.randrange(begin, len(good) + 1), rand.choice((0, 0, 1, 2, 20))
        put_in = rand.choice((rand.choice(FAULTS).encode(), good[at : at + 9], b"\xff", b""))
        data = good[:at] + put_in + good[at + length :]
        # Old versions of libxml2 cannot write a namespace that needs escapes, which is not the matter here.
        return good if re.search(rb"xmlns[^='>]*='[^']*&", data) else data

    def pieces(self, data: bytes) -> list[bytes]:
        """Cut bytes anywhere."""
        size = self._rand.choice((1, 3, 20, 200))
        if size == 1:
            return [data[i : i + 1] for i in range(len(data))]
        places = sorted({self._rand.randrange(len(data)) for _ in range(len(data) // size)})
        return [data[i:j] for i, j in zip([0, *places], [*places, len(data)])]

    def _header(self) -> str:
        more = self._rand.choice(("", "", "", " xml:lang='de'", " xmlns:e='urn:a'", " version='1.0'"))
        declaration = self._rand.choice(("", "<?xml version='1.0'?>", '<?xml version="1.0" encoding="UTF-8"?>\n'))
        names = f"xmlns='{NS_ACCEPT}' xmlns:stream='http://etherx.jabber.org/streams'"
        return f"{declaration}<stream:stream {names} id='x' from='d'{more}>"

    def _stanza(self) -> str:
        name = self._rand.choice(("iq", "iq", "message", "presence"))
        default = self._rand.choice((NS_ACCEPT, NS_ACCEPT, "jabber:client"))
        scope = {"": default, "stream": "http://etherx.jabber.org/streams"}
        keys = [key for key in ("type", "id", "from", "to") if self._rand.random() < 0.7]
        attributes = "".join(f" {key}='{self._text()}'" for key in keys)
        more = self._declarations(scope, ("e", "stream"))
        namespace = f" xmlns='{default}'" if default != NS_ACCEPT else ""
        return f"<{name}{namespace}{attributes}{more}>{self._content(scope, 3)}</{name}>"

    def _declarations(self, scope: dict[str, str], prefixes: tuple[str, ...]) -> str:
        """Return declarations of prefixes, which hold in `scope` from now on; they like to hide others."""
        text = ""
        for prefix in prefixes:
            if self._rand.random() < 0.3:
                scope[prefix] = self._rand.choice(NS_URIS[:-1] if prefix else NS_URIS)
                text += f" xmlns{prefix and ':'}{prefix}='{scope[prefix]}'"
        return text

    def _content(self, scope: dict[str, str], depth: int) -> str:
        parts = []
        for _ in range(self._rand.randrange(3)):
            parts.append(self._element(dict(scope), depth) if depth and self._rand.random() < 0.7 else self._text())
        return "".join(parts).replace("]]>", "]]&gt;")

    def _element(self, scope: dict[str, str], depth: int) -> str:
        declarations = self._declarations(scope, ("", "e", "stream"))
        prefix = self._rand.choice(list(scope))
        name = (prefix and prefix + ":") + self._rand.choice(("x", "query", "iq", "message"))
        bound = self._rand.choice([other for other in scope if other])
        attributes = f" {bound}:k='{self._text()}'" if self._rand.random() < 0.4 else ""
        content = self._content(scope, depth - 1)
        return f"<{name}{declarations}{attributes}" + (f">{content}</{name}>" if content else "/>")

    def _text(self) -> str:
        return "".join(self._rand.choice(TEXTS) for _ in range(self._rand.randrange(4)))


def header_length(data: bytes) -> int:
    return data.index(b">", data.index(b"<stream:stream")) + 1


class Received(NamedTuple):
    """What has become of a stream."""

    stanzas: list[Any]  # see content_of()
    sent: Optional[list[Any]]  # those sent on, as their receiver sees them; None: he refuses them
    fault: str  # a condition of RFC 6120 §4.9.3 (of the reference, expat's words), 'closed' or ''


def content_of(element: Any) -> tuple[Any, ...]:
    """Return all that an XML parser tells of an element, in a form to be compared; of lxml and ElementTree alike."""
    children = tuple((content_of(child), child.tail or "") for child in element)
    return element.tag, tuple(sorted(element.attrib.items())), element.text or "", children


def parse_with_ours(pieces: list[bytes]) -> Received:
    """Feed a StreamParser; every third stanza is discarded, the others are rewritten and sent on."""
    from clientproxy import StreamParser

    parser, stanzas, output = StreamParser(1 << 20), [], b""
    for piece in pieces:
        kept = 0
        for element in parser.feed(piece):
            stanzas.append(content_of(element))
            if len(stanzas) % 3:
                element.set("to", "somebody")
                kept += 1
            else:
                parser.discard(element)
        output += parser.take_output(kept, 1 << 20, lambda element: None)
        if parser.fault is not None or parser.closed:
            break
    fault = parser.fault.condition if parser.fault is not None else ""
    return Received(stanzas, received(output), "closed" if parser.closed else fault)


def received(output: bytes) -> Optional[list[Any]]:
    """Return what the server makes of stanzas."""
    try:
        root = ElementTree.fromstring(STREAM_HEADER.format("", "").encode() + output + b"</stream:stream>")
    except ElementTree.ParseError:
        return None
    return [content_of(element) for element in root]


def parse_with_expat(data: bytes) -> Received:
    """Do the same with ElementTree, as a reference; it stops at an element that is no stanza."""
    parser: Any = ElementTree.XMLPullParser(("start", "end"))
    stanzas: list[Any] = []
    depth, fault = -1, ""
    try:
        for i in range(len(data)):
            parser.feed(data[i : i + 1])
            for event, element in parser.read_events():
                depth += 1 if event == "start" else -1
                if event == "end" and not depth:
                    stanzas.append(content_of(element))
                elif depth == 1 and event == "start" and not TOP_LEVEL.fullmatch(element.tag):
                    raise ValueError(f"<{element.tag}> is no stanza")
                elif depth < 0:
                    raise ValueError("closed")
    except ElementTree.ParseError as error:
        fault = f"namespaces: {error}" if well_formed(data[: i + 1]) else str(error)
    except (LookupError, ValueError) as error:  # of the encoding, or of ours
        fault = str(error)
    return Received(stanzas, [sent_on(stanza) for n, stanza in enumerate(stanzas, 1) if n % 3], fault)


def well_formed(data: bytes) -> bool:
    """Whether the beginning of a document is, namespaces aside."""
    try:
        expat.ParserCreate().Parse(data, False)
    except expat.ExpatError:
        return False
    return True


def sent_on(stanza: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what parse_with_ours() makes of a stanza."""
    tag, attributes, *rest = stanza
    return (tag, tuple(sorted({**dict(attributes), "to": "somebody"}.items())), *rest)


def begins_with(one: list[Any], other: list[Any]) -> bool:
    """Whether one of two lists is the beginning of the other."""
    return all(mine == his for mine, his in zip(one, other))


def check_good_stream(maker: StreamMaker) -> int:
    """However it is cut, a right stream gives what expat sees, and so do the stanzas sent on; return how many."""
    data = maker.stream()
    pieces = maker.pieces(data)
    ours, whole = parse_with_ours(pieces), parse_with_ours([data])
    his = parse_with_expat(data)
    assert ours == whole == his, difference(data, pieces, ours, whole, his)
    return len(ours.stanzas)


def check_spoilt_stream(maker: StreamMaker) -> int:
    """However it is cut, a faulty stream has the same end, and what came before is what expat sees; return how much.

    Left free are three things. What comes in one read with an element that is no stanza, or with a wrong prefix, may
    be handled. Of several faults in a header the one that is found first depends on the pieces. And libxml2 finds
    some faults only when more has come.
    """
    data = maker.spoilt()
    pieces = maker.pieces(data)
    ours, whole, his = parse_with_ours(pieces), parse_with_ours([data]), parse_with_expat(data)
    note = difference(data, pieces, ours, whole, his)
    assert begins_with(ours.stanzas, whole.stanzas) and begins_with(ours.stanzas, his.stanzas), note
    faults = {ours.fault, whole.fault}
    strange = his.fault.startswith("namespaces") or his.fault.endswith("is no stanza")
    assert strange or ours[:2] == whole[:2], note
    if "" in faults:  # it may wait for more
        assert ours.fault == whole.fault or his.fault and not strange, note
    else:
        assert ours.fault == whole.fault or strange or not ours.stanzas or "closed" in faults, note
    assert ours.fault or his.fault or ours == his, note
    return len(ours.stanzas)


def difference(data: bytes, pieces: list[bytes], *results: Received) -> str:
    """Return what a person needs to see of results that should be the same."""
    sizes = "one byte" if len(pieces) == len(data) else f"{[len(piece) for piece in pieces]} bytes"
    lines = [f"stream {data!r}", f"in pieces of {sizes}, whole, and by expat:"]
    for stanzas, sent, fault in results:
        lines.append(f"fault {fault!r}, {len(stanzas)} stanzas, {'sent on wrongly' if sent is None else len(sent)}")
    both = (("stanza", [result.stanzas for result in results]), ("sent on,", [result.sent or [] for result in results]))
    for what, columns in both:
        for n, ways in enumerate(itertools.zip_longest(*columns), 1):
            if not all(way == ways[0] for way in ways):
                lines += [f"{what} {n}:", *map(repr, ways)]
    return "\n".join(lines)


def parser_random(seed: int, rounds: int) -> int:
    """Check random streams; needs nothing but lxml, and can be run under valgrind."""
    rand, stanzas, started = random.Random(seed), 0, time.monotonic()
    maker = StreamMaker(rand)
    for number in range(rounds):
        try:
            stanzas += check_spoilt_stream(maker) if number % 2 else check_good_stream(maker)
        except AssertionError as failure:
            raise ToolFailure(f"seed {seed}, round {number}: {failure}") from None
    seconds = time.monotonic() - started
    print(f"parser-random {seed} {rounds}: {stanzas} stanzas, each stream whole and in pieces; {seconds:.1f} s")
    return 0


def parser_random_command(argv: list[str]) -> int:
    """Run the parser's random test: parser-random SEED ROUNDS."""
    parser = argparse.ArgumentParser(prog="parser-random", description="random streams, for valgrind")
    parser.add_argument("seed", type=int, nargs="?", default=random.randrange(10**6))
    parser.add_argument("rounds", type=int, nargs="?", default=2000)
    given = parser.parse_args(argv)
    return parser_random(given.seed, given.rounds)


# ----------------------------------------------------------------------------- random events: the core's fuzz

CORE_JID, CORE_TARGET = "proxy.localhost", "impl@localhost"
CORE_USERS = ("ann@localhost/x", "ann@localhost/y", "bob@localhost/z", "bob@other.example", "long@d/" + "o" * 1020)
CORE_STEPS = {  # what happens, with weights
    "request": 9, "answer": 8, "wrong_answer": 2, "come": 3, "go": 1, "presence": 1, "flush": 6, "deliver": 6,
    "pass_time": 2, "target_asks": 2, "user_answers": 2, "message": 1, "rubbish": 1, "fault": 1, "lose": 1,
    "connect": 2,
}  # fmt: skip
SERVICE_UNAVAILABLE = (
    "<error type='cancel'><service-unavailable xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"
)


@functools.cache
def core_component(encoding: str, policy: str, relay: str) -> Any:
    """Return the configuration of a component with narrow bounds."""
    from clientproxy import ConfigurationReader

    with tempfile.NamedTemporaryFile("w") as file:
        file.write(
            f"[{CORE_JID}]\ntarget_address = {CORE_TARGET}\nsecret = s\nencoding = {encoding}\npolicy = {policy}\n"
            f"relay = {relay}\nmax_pending = 6\nmax_pending_per_user = 3\nmax_send = 1500\n"
        )
        file.flush()
        return ConfigurationReader(file.name).read().components[CORE_JID]


class CoreRun:
    """A Proxy and its streams, with a server, clients and time that do what chance tells them.

    Kept are the answers that are owed. There must be neither one too many nor one too few, and what comes from
    somebody who was not asked must reach nobody.
    """

    def __init__(self, rand: random.Random) -> None:
        from clientproxy import POLICIES, Proxy

        self._rand = rand
        encoding, relay = rand.choice(("jid", "opaque")), rand.choice(("", "iq message presence"))
        self._component = core_component(encoding, rand.choice(sorted(POLICIES)), relay)
        self._proxy = Proxy(self._component, {CORE_JID}, rand.random, lambda level, template, *arguments: None)
        self._now = 1000.0
        self._stream: Any = None  # None: there is no connection
        self._queue: list[tuple[str, Optional[tuple[str, ...]]]] = []  # to the proxy: stanza, the answer owed for it
        self._out = b""  # from the proxy, not yet with the server
        self._owed: Counter[tuple[str, ...]] = Counter()  # (requester, asked, id)
        self._asked: list[tuple[str, str, str]] = []  # requests that resources have: (resource, encoded address, id)
        self._asked_users: list[tuple[str, str, str]] = []  # the same of users
        self.requests = 0
        self.events: list[str] = []

    def run(self, steps: int) -> None:
        """Do so many steps; then everything must come to its end."""
        names, weights = list(CORE_STEPS), list(CORE_STEPS.values())
        self.connect()
        for name in self._rand.choices(names, weights, k=steps):
            self.events.append(name)
            getattr(self, name)()
        self._settle()

    def _settle(self) -> None:
        for _ in range(4):
            self.connect()
            self.flush()
            self.deliver()
            self._tick(31.0)
        self.deliver()
        proxy = self._proxy
        assert not +self._owed, f"not answered: {+self._owed}"
        assert not proxy.owed() and not len(proxy.requests), f"{proxy.owed()} requests are left in the tables"
        assert not any(resource.open for resource in proxy.roster.resources.values()), "a resource still has requests"
        left = vars(proxy.requests)
        assert not left["_users"] and not left["_of_target"] and not left["_long_ids"], f"left: {left}"

    # -- the connection

    def connect(self) -> None:
        from clientproxy import ComponentStream

        if self._stream is None:
            self._stream = stream = ComponentStream(CORE_JID, "s", 65536, self._component.max_send, self._proxy)
            stream.open(self._now)
            stream.receive(STREAM_HEADER.format(CORE_JID, "core").encode(), self._now)
            stream.data_to_send()
            self._proxy.now = self._now
            stream.receive(b"<handshake/>", self._now)
            self._out = stream.data_to_send()

    def lose(self) -> None:
        """The connection breaks: part of what was under way has arrived."""
        from clientproxy import unsent_answers

        if self._stream is None:
            return
        if self._rand.random() < 0.5:
            self.flush()
        sent = self._rand.randrange(len(self._out) + 1)
        unsent, before = unsent_answers(self._out, sent), self._out[:sent]
        self._server_reads(before)
        self._stream, self._queue, self._out = None, [], b""
        self._proxy.lost(self._now, unsent)

    def flush(self) -> None:
        """What the server has sent reaches the proxy, in one or more reads."""
        queue, self._queue = self._queue, []
        data = "".join(stanza for stanza, _ in queue).encode()
        if self._stream is None or not data:
            return
        self._owed.update(owed for _, owed in queue if owed is not None)
        cut = self._rand.randrange(len(data) + 1)
        for piece in (data[:cut], data[cut:]):
            if self._stream is not None and piece:
                self._proxy.now = self._now
                self._stream.receive(piece, self._now)
                self._out += self._stream.data_to_send()
                self._end_if_closing()

    def deliver(self) -> None:
        """What the proxy has sent reaches the server."""
        out, self._out = self._out, b""
        self._server_reads(out)

    def pass_time(self) -> None:
        self._tick(self._rand.choice((0.1, 1.0, 5.0, 31.0) if self._stream is not None else (0.1, 1.0, 5.0)))

    def _tick(self, seconds: float) -> None:
        self._now += seconds
        if self._stream is not None:
            self.flush()  # what has arrived is read before anything is declared late
        if self._stream is not None and self._now >= self._stream.next_deadline():
            self._stream.tick(self._now)
        if self._now >= self._proxy.next_deadline():
            self._proxy.tick(self._now)
        if self._stream is not None:
            self._out += self._stream.data_to_send()
            self._end_if_closing()

    def _end_if_closing(self) -> None:
        """After a fault everything is still sent; then the connection ends."""
        from clientproxy import State

        if self._stream is not None and self._stream.state is not State.READY:
            self.deliver()
            self._stream = None
            self._proxy.lost(self._now, [])

    # -- what is sent to the component

    def _send(self, stanza: str, owed: Optional[tuple[str, ...]] = None) -> None:
        if self._stream is not None:
            self._queue.append((stanza, owed))

    def _iq(self, kind: str, id_: str, from_: str, to: str, payload: str) -> str:
        attributes = f" type='{kind}' id='{id_}'" if id_ else f" type='{kind}'"
        return f"<iq{attributes} from='{from_}' to='{to}'>{payload}</iq>"

    def request(self) -> None:
        rand = self._rand
        user, asked = rand.choice(CORE_USERS), rand.choice((CORE_JID, CORE_JID, f"{CORE_JID}/r", f"node@{CORE_JID}"))
        id_, kind = rand.choice(("1", "2", "3", "4", "i" * 300, "")), rand.choice(("get", "set", "set", "other"))
        payload = rand.choice(("<q xmlns='urn:q'/>",) * 6 + ("", "<q/><q/>", f"<q>{'x' * 1400}</q>"))
        self.requests += 1
        self._send(self._iq(kind, id_, user, asked, payload), (user, asked, id_))

    def answer(self) -> None:
        """A resource answers, sometimes twice, or late."""
        if self._asked:
            resource, encoded, id_ = self._asked.pop(self._rand.randrange(len(self._asked)))
            results = ("<r xmlns='urn:right'/>", "", f"<r>{'x' * 1400}</r>")
            payload = self._rand.choice((*results, SERVICE_UNAVAILABLE))
            kind = "error" if payload == SERVICE_UNAVAILABLE else "result"
            for _ in range(self._rand.choice((1, 1, 1, 2))):
                self._send(self._iq(kind, id_, resource, encoded, payload))

    def wrong_answer(self) -> None:
        """Somebody answers who was not asked, or to what was not asked."""
        if self._asked:
            resource, encoded, id_ = self._rand.choice(self._asked)
            sender = self._rand.choice((f"{CORE_TARGET}/never", CORE_TARGET, "eve@localhost/x", resource))
            id_ = f"{id_}0" if sender == resource else id_
            self._send(self._iq(self._rand.choice(("result", "error")), id_, sender, encoded, "<w xmlns='urn:wrong'/>"))

    def target_asks(self) -> None:
        resource, user = f"{CORE_TARGET}/{self._rand.choice('abc')}", self._rand.choice(CORE_USERS)
        address, id_ = self._proxy.codec.encode(user), self._rand.choice(("1", "2", ""))
        self.requests += 1
        self._send(self._iq("get", id_, resource, address, "<q xmlns='urn:q'/>"), (resource, address, id_))

    def user_answers(self) -> None:
        if self._asked_users:
            user, asked, id_ = self._asked_users.pop(self._rand.randrange(len(self._asked_users)))
            self._send(self._iq("result", id_, user, asked, "<r xmlns='urn:right'/>"))

    def come(self) -> None:
        self._send(f"<presence from='{CORE_TARGET}/{self._rand.choice('abc')}' to='{CORE_JID}'/>")

    def go(self) -> None:
        self._send(f"<presence type='unavailable' from='{CORE_TARGET}/{self._rand.choice('abc')}' to='{CORE_JID}'/>")

    def presence(self) -> None:
        kinds = ("subscribe", "subscribed", "unsubscribe", "unsubscribed", "unavailable", "probe", "error")
        sender = self._rand.choice((CORE_TARGET, CORE_TARGET, f"{CORE_TARGET}/a", CORE_USERS[0]))
        self._send(f"<presence type='{self._rand.choice(kinds)}' from='{sender}' to='{CORE_JID}'/>")

    def message(self) -> None:
        user = CORE_USERS[0]
        ways = ((user, CORE_JID), (f"{CORE_TARGET}/a", self._proxy.codec.encode(user)), (f"{CORE_TARGET}/a", CORE_JID))
        sender, to = self._rand.choice(ways)
        self._send(f"<message from='{sender}' to='{to}'><body>hello</body></message>")

    def rubbish(self) -> None:
        """Something comes that nobody is owed an answer for."""
        self._send(self._rand.choice((
            f"<iq type='get' id='1' to='{CORE_JID}'><q/></iq>", f"<iq type='result' from='{CORE_JID}' id='1'/>",
            "<iq/>",
            f"<iq type='error' id='9' from='{CORE_JID}' to='{CORE_USERS[0]}'/>", "<presence/>", "<message/>", " ",
            f"<iq type='get' id='alive' from='{CORE_JID}' to='{CORE_JID}'><q/></iq>", "<stream:features/>",
        )))  # fmt: skip

    def fault(self) -> None:
        """Something comes that ends the stream; what came before is still handled."""
        self._send(self._rand.choice(("<!-- a comment -->", "<strange/>", "</iq>", "<iq><a></iq>")))
        self.flush()

    # -- what the component has sent

    def _server_reads(self, data: bytes) -> None:
        """Read whole stanzas; one that is cut off is lost."""
        parser: Any = ElementTree.XMLPullParser(("start", "end"))
        parser.feed(STREAM_HEADER.format("", "").encode() + data)
        depth = 0
        for event, element in parser.read_events():
            depth += 1 if event == "start" else -1
            if event == "end" and depth == 1 and element.tag == f"{{{NS_ACCEPT}}}iq":
                self._server_routes(element)

    def _server_routes(self, iq: Stanza) -> None:
        kind, id_, from_, to = (iq.get(key, "") for key in ("type", "id", "from", "to"))
        assert from_.partition("/")[0].rpartition("@")[2] == CORE_JID, f"a wrong from: {from_}"
        assert not any(child.tag.startswith("{urn:wrong}") for child in iq), f"a wrong answer has reached {to}"
        if kind in ("result", "error"):
            self._owed[to, from_, id_] -= 1
            assert self._owed[to, from_, id_] >= 0, f"{to} is answered once too often, from {from_}, id {id_!r}"
        elif to.startswith(CORE_TARGET + "/"):
            self._asked.append((to, from_, id_))
        elif to != CORE_JID:
            self._asked_users.append((to, from_, id_))


# ------------------------------------------------------------------------------------------------- fuzz


def core_random(rand: random.Random) -> int:
    """Check a Proxy with random events; return the number of requests."""
    run = CoreRun(rand)
    try:
        run.run(rand.randrange(1, 80))
    except AssertionError as failure:
        raise AssertionError(f"{failure}\nafter {' '.join(run.events)}") from None
    return run.requests


def fuzz(argv: list[str]) -> int:
    """Let hypothesis look for streams and sequences of events that break a property; print how many it has tried."""
    parser = argparse.ArgumentParser(prog="fuzz", description="property-based fuzz of parser and core, with hypothesis")
    parser.add_argument("examples", type=int, nargs="?", default=5000, help="of each property, default: %(default)s")
    examples = parser.parse_args(argv).examples
    try:
        import hypothesis
    except ImportError:
        raise ToolFailure(f"{sys.executable} has no hypothesis: pip install hypothesis, or make fuzz") from None
    properties: tuple[tuple[str, str, Callable[[random.Random], int]], ...] = (
        ("streams in order, cut anywhere", "stanzas as expat sees them", lambda r: check_good_stream(StreamMaker(r))),
        ("streams with a fault", "stanzas before it", lambda r: check_spoilt_stream(StreamMaker(r))),
        ("sequences of events", "requests, each answered once", core_random),
    )
    print(f"hypothesis {hypothesis.__version__}, {versions()}", flush=True)
    for name, things, check in properties:
        started, tally = time.monotonic(), Tally(check)
        try:
            tally.run(examples)
        except AssertionError as failure:
            raise ToolFailure(f"{name}: after {tally.examples} examples this one fails:\n{failure}") from None
        seconds = time.monotonic() - started
        print(f"{tally.examples:8,d} {name}: {tally.things:,} {things}, {seconds:.0f} s", flush=True)
    return 0


class Tally:
    """A property that counts what it has seen."""

    def __init__(self, check: Callable[[random.Random], int]) -> None:
        self.examples = self.things = 0
        self._check = check

    def run(self, examples: int) -> None:
        """Raises the property's AssertionError, with the smallest example that hypothesis has found."""
        from hypothesis import HealthCheck, given, settings
        from hypothesis import strategies as st

        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.randoms(use_true_random=False))
        def holds(rand: random.Random) -> None:
            self.examples += 1
            self.things += self._check(rand)

        holds()


# ------------------------------------------------------------------------------------------ the tools' names

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": lambda argv: demo(),
    "bench": bench,
    "growth": growth,
    "soak": soak,
    "servers": servers,
    "fuzz": fuzz,
    "parser-random": parser_random_command,
    "floor": floor,
}


def run_tool(name: str, argv: list[str]) -> int:
    """Run one of COMMANDS; return its exit status."""
    try:
        return COMMANDS[name](argv)
    except ToolFailure as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read it has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def main() -> int:
    """Run a tool where one is named, else the tests."""
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        return run_tool(sys.argv[1], sys.argv[2:])
    unittest.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
