"""Renders the kustomize tree from the chart, and copies alerts and dashboards into the chart: `make manifests`.

The base has the objects common to both engines, an overlay those of one engine, a component those of an option.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CHART = HERE / "chart"
COPIES = {
    CHART / "files/alerts.yaml": HERE.parent / "prometheus/alerts.yaml",
    CHART / "files/dashboards/store.json": HERE.parent / "grafana/store.json",
    CHART / "files/dashboards/frontends.json": HERE.parent / "grafana/frontends.json",
}
"""Files of the chart that are copies: a packaged chart cannot read beyond its directory."""
_OF_HELM = re.compile(r" +(helm\.sh/chart: .*|app\.kubernetes\.io/managed-by: Helm)\n|^# Source: .*\n", re.MULTILINE)
_HEAD = "# Rendered from the chart: change that, and run `make manifests`.\n"


def rendered(helm: str, engine: str, *values: str) -> dict[str, str]:
    """Return the objects by kind and name that the chart renders with the values of an engine and `name=value`s."""
    given = [text for name in ("common", engine) for text in ("--values", str(CHART / f"ci/{name}-values.yaml"))]
    command = [helm, "template", "resumed", str(CHART), "--namespace", "resumed", "--no-hooks", *given]
    text = subprocess.run(  # noqa: S603 - the Makefile passes the command
        [*command, *(part for value in values for part in ("--set", value))],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    objects = [_OF_HELM.sub("", each).strip() for each in re.split(r"^---$", text, flags=re.MULTILINE)]
    return {f"{_field('kind', each)}/{_field('  name', each)}": each for each in objects if each}


def _field(name: str, text: str) -> str:
    return next(iter(re.findall(rf"^{name}: (\S+)$", text, re.MULTILINE)), "")


def tree(helm: str) -> dict[Path, str]:
    """Return the content of the rendered files, by their paths."""
    embedded, valkey = rendered(helm, "embedded"), rendered(helm, "valkey")
    base = {name: text for name, text in embedded.items() if valkey.get(name) == text}
    parts = {
        "base": base,
        "overlays/embedded": _added(embedded, base),
        "overlays/valkey": _added(valkey, base),
        "components/cert-manager": _added(rendered(helm, "embedded", "tls.certManager.enabled=true"), embedded),
        "components/monitoring": _added(
            rendered(
                helm,
                "embedded",
                *(f"metrics.{name}.enabled=true" for name in ("serviceMonitor", "podMonitor", "prometheusRule")),
            ),
            embedded,
        ),
    }
    return {
        HERE / "kustomize" / name / "resources.yaml": _HEAD + "".join(f"---\n{text}\n" for text in objects.values())
        for name, objects in parts.items()
    }


def _added(objects: dict[str, str], before: dict[str, str]) -> dict[str, str]:
    """Return the new objects; the others must be unchanged, since the tree adds and never patches."""
    changed = [name for name, text in before.items() if objects.get(name) != text]
    if changed:
        raise SystemExit(f"not only added, but changed: {', '.join(changed)}")
    return {name: text for name, text in objects.items() if name not in before}


if __name__ == "__main__":
    for copy, original in COPIES.items():
        copy.write_bytes(original.read_bytes())
    for path, content in tree(sys.argv[1]).items():
        path.write_text(content)
