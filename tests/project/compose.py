"""docker-compose.yml as Compose resolves it: by Compose itself where it is installed, else by the rules it uses."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
VARIABLE = re.compile(r"\$(?:(?P<escaped>\$)|\{(?P<name>\w+)(?:(?P<how>:[?-])(?P<word>[^}]*))?\})")


class Refused(Exception):
    """Compose does not start with these variables; the message says which one is missing."""


def resolve(variables: Mapping[str, str]) -> dict[str, Any]:
    """The configuration with these variables in place. Raises Refused."""
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
        return _by_docker(docker, variables)
    return _by_rules(variables)


def _by_docker(docker: str, variables: Mapping[str, str]) -> dict[str, Any]:
    command = [docker, "compose", "--file", str(FILE), "--env-file", os.devnull, "config", "--format", "json"]
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise Refused(done.stderr)
    found: dict[str, Any] = yaml.safe_load(done.stdout)
    return found


def _by_rules(variables: Mapping[str, str]) -> dict[str, Any]:
    """Interpolation, and the two short forms we use turned into the long ones that `docker compose config` prints."""

    def value(match: re.Match[str]) -> str:
        if match["escaped"]:
            return "$"
        given = variables.get(match["name"], "")
        if given or match["how"] is None:
            return given
        if match["how"] == ":?":
            raise Refused(f"required variable {match['name']} is missing a value: {match['word']}")
        return match["word"] or ""

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: walk(each) for key, each in node.items() if not str(key).startswith("x-")}
        if isinstance(node, list):
            return [walk(each) for each in node]
        return VARIABLE.sub(value, node) if isinstance(node, str) else node

    found: dict[str, Any] = walk(yaml.safe_load(FILE.read_text()))
    for service in found["services"].values():
        service["ports"] = [_port(port) for port in service.get("ports", [])]
        service["volumes"] = [_volume(volume) for volume in service.get("volumes", [])]
    return found


def _port(short: str) -> dict[str, Any]:
    address, published, target = short.split(":")
    return {"host_ip": address, "published": published, "target": int(target)}


def _volume(short: str) -> dict[str, Any]:
    source, target = short.split(":")
    return {"type": "volume", "source": source, "target": target}
