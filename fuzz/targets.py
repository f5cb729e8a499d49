"""All targets, by their names."""

from __future__ import annotations

from fuzz.answers import ANSWERS
from fuzz.handshakes import HANDSHAKES
from fuzz.parsers import PARSERS
from fuzz.scrapes import SCRAPES

TARGETS = {target.name: target for target in (*PARSERS, *ANSWERS, *HANDSHAKES, *SCRAPES)}
