"""All targets, by their names."""

from __future__ import annotations

from fuzz.answers import ANSWERS
from fuzz.handshakes import HANDSHAKES
from fuzz.parsers import PARSERS

TARGETS = {target.name: target for target in (*PARSERS, *ANSWERS, *HANDSHAKES)}
