"""URLs by which a picture fetcher may be led where it must not go, and the names that they use.

`inner` and `outer` are the two servers of the test; ${I} is the port of `inner`, ${O} that of `outer`.
"""

from __future__ import annotations

OUTER = "127.0.0.2"

INSIDE_NAMES = {
    "inside.test": ["127.0.0.1"],
    "any.test": ["0.0.0.0"],
    "far-loopback.test": ["127.255.255.254"],
    "mixed.test": [OUTER, "127.0.0.1"],
    "mixed-last.test": ["127.0.0.1", OUTER],
    "wild.127.0.0.1.nip.test": ["127.0.0.1"],
    "v6.test": ["::1"],
    "v6-any.test": ["::"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "mapped-hex.test": ["::ffff:7f00:1"],
    "xn--inside-cua.test": ["127.0.0.1"],
    "under_score.test": ["127.0.0.1"],
}
OUTSIDE_NAMES = {"outer.test": [OUTER]}
ELSEWHERE = {
    "private-10.test": ["10.0.0.1"],
    "private-172.test": ["172.16.0.1"],
    "private-192.test": ["192.168.0.1"],
    "cgnat.test": ["100.64.0.1"],
    "metadata.test": ["169.254.169.254"],
    "metadata-v6.test": ["fd00:ec2::254"],
    "metadata-cgnat.test": ["100.100.100.200"],
    "multicast.test": ["224.0.0.1"],
    "broadcast.test": ["255.255.255.255"],
    "reserved.test": ["240.0.0.1"],
    "benchmark.test": ["198.18.0.1"],
    "link-local.test": ["fe80::1%lo"],
    "unique-local.test": ["fc00::1"],
    "site-local.test": ["fec0::1"],
    "multicast-v6.test": ["ff02::1"],
    "compatible.test": ["::7f00:1"],
    "6to4.test": ["2002:7f00:1::1"],
    "nat64.test": ["64:ff9b::7f00:1"],
    "nat64-local.test": ["64:ff9b:1::7f00:1"],
    "teredo.test": ["2001:0:4136:e378:8000:63bf:80ff:fffe"],
    "isatap.test": ["2606:4700::5efe:7f00:1"],
    "isatap-unique.test": ["2606:4700::200:5efe:7f00:1"],
    "documentation.test": ["2001:db8::1"],
}
NAMES = INSIDE_NAMES | OUTSIDE_NAMES | ELSEWHERE

# A careless client reaches `inner` by each of these.
REACHING = [
    "http://127.0.0.1:${I}/x",
    "http://127.0.0.1.:${I}/x",
    "http://127.1:${I}/x",
    "http://127.0.1:${I}/x",
    "http://127.1.1.1:${I}/x",
    "http://2130706433:${I}/x",
    "http://017700000001:${I}/x",
    "http://0177.0.0.1:${I}/x",
    "http://0177.0.0.01:${I}/x",
    "http://127.0.0.01:${I}/x",
    "http://0x7f000001:${I}/x",
    "http://0X7F000001:${I}/x",
    "http://0x7f.0.0.1:${I}/x",
    "http://0x7f.1:${I}/x",
    "http://127.0x1:${I}/x",
    "http://0:${I}/x",
    "http://0.0.0.0:${I}/x",
    "http://0x0:${I}/x",
    "http://[::1]:${I}/x",
    "http://[0:0:0:0:0:0:0:1]:${I}/x",
    "http://[::]:${I}/x",
    "http://[::ffff:127.0.0.1]:${I}/x",
    "http://[::ffff:7f00:1]:${I}/x",
    "http://[0:0:0:0:0:ffff:127.0.0.1]:${I}/x",
    "http://localhost:${I}/x",
    "http://LOCALHOST:${I}/x",
    "http://user@127.0.0.1:${I}/x",
    "http://user:password@127.0.0.1:${I}/x",
    "http://outer.test@127.0.0.1:${I}/x",
    "http://outer.test:80@127.0.0.1:${I}/x",
    "http://outer.test%2f@127.0.0.1:${I}/x",
    "http://outer.test#@inside.test:${I}/x".replace("#", "%23"),
    "http://１２７.0.0.1:${I}/x",
    "http://127。0。0。1:${I}/x",
    "http://127．0．0．1:${I}/x",
    "http://①②⑦.⓪.⓪.①:${I}/x",
    "http://ｌｏｃａｌｈｏｓｔ:${I}/x",
    *(f"http://{name}:${{I}}/x" for name in INSIDE_NAMES),
    "http://inside.test.:${I}/x",
    "http://INSIDE.TEST:${I}/x",
]

# `outer` is asked, and leads inside: (status, where to) of each hop; ${H} is `outer`'s own next one.
REDIRECTS = [
    *([(status, "http://127.0.0.1:${I}/x")] for status in (301, 302, 303, 307, 308)),
    [(302, "//127.0.0.1:${I}/x")],
    [(302, "http://2130706433:${I}/x")],
    [(302, "http://0x7f000001:${I}/x")],
    [(302, "http://[::1]:${I}/x")],
    [(302, "http://[::ffff:127.0.0.1]:${I}/x")],
    [(302, "http://inside.test:${I}/x")],
    [(302, "http://mixed-last.test:${I}/x")],
    [(302, "http://user@127.0.0.1:${I}/x")],
    [(302, "${H}"), (307, "http://127.0.0.1:${I}/x")],
    [(308, "${H}"), (302, "/hop/2"), (301, "http://inside.test:${I}/x")],
]

# `outer` is asked, and leads to what no careful client follows.
BAD_REDIRECTS = [
    "file:///etc/passwd",
    "gopher://127.0.0.1:${I}/_x",
    "ftp://127.0.0.1:${I}/x",
    "javascript:alert(1)",
    "http://169.254.169.254/latest/meta-data/",
    "http://metadata.test/computeMetadata/v1/",
    "http://[::1",
    "http://127.0.0.1:${I}\\@outer.test/",
    "http://127.0.0.1:99999/",
]

# Not even a careless client of ours speaks these, or they lead to addresses that are not on this machine.
REFUSED = [
    *(f"http://{name}/x" for name in ELSEWHERE),
    *(f"http://[{address[0]}]/x" for name, address in ELSEWHERE.items() if ":" in address[0] and "%" not in address[0]),
    "http://[::1%25lo]:${I}/x",
    "file:///etc/passwd",
    "file://127.0.0.1/etc/passwd",
    "gopher://127.0.0.1:${I}/_GET%20/x",
    "ftp://127.0.0.1:${I}/x",
    "dict://127.0.0.1:${I}/info",
    "ldap://127.0.0.1:${I}/x",
    "data:image/png;base64,iVBORw0KGgo=",
    "jar:http://127.0.0.1:${I}!/x",
    "unix:/run/docker.sock",
    "//127.0.0.1:${I}/x",
    "http:127.0.0.1:${I}/x",
    "http:///127.0.0.1:${I}/x",
    "http://[::1",
    "http://127.0.0.1:${I}\\@outer.test/x",
    "http://outer.test:${I}:80/x",
    "http://127.0.0.1:99999/x",
    "http://127.0.0.1:${I}\r\nHost: outer.test/x",
    "http://%31%32%37%2e0.0.1:${I}/x",
    "http://a..test:${I}/x",
    "http://.test:${I}/x",
]
