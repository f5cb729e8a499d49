"""Finds parts of rendered objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.kubernetes import Object


def of(objects: list[Object], *kinds: str, suffix: str | None = None) -> Object:
    """Return the one object of these kinds, whose name ends in `suffix` if that is given."""
    (found,) = [
        each
        for each in objects
        if each["kind"] in kinds and (suffix is None or each["metadata"]["name"] == f"resumed{suffix}")
    ]
    return found


def kinds(objects: list[Object]) -> set[str]:
    """Return the kinds of all objects."""
    return {each["kind"] for each in objects}


def pod(objects: list[Object]) -> Any:
    """Return the template of the server's pods."""
    return of(objects, "StatefulSet", "Deployment")["spec"]["template"]


def container(objects: list[Object]) -> Any:
    """Return the first container of the server's pods."""
    return pod(objects)["spec"]["containers"][0]


def env(objects: list[Object]) -> dict[str, str]:
    """Return the environment of the server."""
    return {each["name"]: each["value"] for each in container(objects)["env"]}


def mounts(objects: list[Object]) -> dict[str, Any]:
    """Return the volumes of the server by their paths; None for a claim of the StatefulSet."""
    volumes = {each["name"]: each for each in pod(objects)["spec"].get("volumes", [])}
    return {each["mountPath"]: volumes.get(each["name"]) for each in container(objects).get("volumeMounts", [])}


def pods(objects: list[Object]) -> dict[str, Any]:
    """Return the specs of all pods by kind and name: the server's, those of Jobs, and those of `helm test`."""
    found = {}
    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] == "CronJob":
            spec = spec["jobTemplate"]["spec"]
        if each["kind"] != "Pod":
            spec = spec.get("template", {}).get("spec", {})
        if "containers" in spec:
            found[f"{each['kind']}/{each['metadata']['name']}"] = spec
    return found


def part(objects: list[Object], where: str) -> Any:
    """Return a part of the objects, None if it does not exist.

    Args:
        objects: The objects.
        where: `has:KIND`, `env:NAME`, `mount:PATH`, or `KIND:STEP STEP ...`: keys and indices below an object named
            `resumed` (`KIND-SUFFIX`: `resumed-SUFFIX`), the template of the pods (`pod`), or the container
            (`container`).
    """
    kind, _, path = where.partition(":")
    if kind == "has":
        return path in kinds(objects)
    if kind in ("env", "mount"):
        return {"env": env, "mount": mounts}[kind](objects).get(path)
    kind, dash, suffix = kind.partition("-")
    start = {"pod": pod, "container": container}.get(kind) or (lambda them: of(them, kind, suffix=dash + suffix))
    found: Any = start(objects)
    for step in path.split():
        if isinstance(found, list):
            found = found[int(step)] if int(step) < len(found) else None
        else:
            found = (found or {}).get(step)
    return found
