"""Visits hosts in turn with Chrome's hello: `browser.py PORT CA CERTIFICATE KEY COUNT HOST...`.

Prints a line for every 100 visits, and one "failed: ..." for each visit without an answer of status 200.
"""

from __future__ import annotations

import sys

from curl_cffi import CurlOpt, requests


def main() -> None:
    """Visit."""
    port, authority, certificate, key, count, *hosts = sys.argv[1:]
    options = {
        CurlOpt.FORBID_REUSE: 1,
        CurlOpt.FRESH_CONNECT: 1,
        CurlOpt.RESOLVE: [f"{host}:{port}:127.0.0.1" for host in hosts],
    }
    session = requests.Session(
        impersonate="chrome", verify=authority, cert=(certificate, key), curl_options=options, timeout=10
    )
    for visited in range(1, int(count) + 1):
        host = hosts[visited % len(hosts)]
        try:
            answer = session.get(f"https://{host}:{port}/", headers={"User-Agent": "browser"})
            if answer.status_code != 200:
                print(f"failed: {host}: answer {answer.status_code}", flush=True)  # noqa: T201
        except requests.RequestsError as error:
            print(f"failed: {host}: {error}", flush=True)  # noqa: T201
        if visited % 100 == 0:
            print(visited, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
