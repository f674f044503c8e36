"""Rewrites data/sdk_fields.json from the types of an installed `openai` package.

    python3 -m venv /tmp/sdk && /tmp/sdk/bin/pip install openai==3.52.0
    /tmp/sdk/bin/python tests/record_sdk_fields.py

No test runs this: the tests read what it has written, and need no package.
"""

from __future__ import annotations

import datetime
import importlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Iterator

from typing_extensions import (
    Literal,
    Required,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

PACKAGE = "openai"
RECORD = Path(__file__).parent / "data" / "sdk_fields.json"
ENDPOINTS = {
    "generations": ("image_generate_params", "ImageGenerateParams"),
    "edits": ("image_edit_params", "ImageEditParams"),
}


def fields(params: type, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the fields of a TypedDict with what is known of each; dots lead into nested ones."""
    hints: dict[str, Any] = get_type_hints(params, include_extras=True)
    for name, hint in hints.items():
        required = get_origin(hint) is Required
        nested = [part for part in parts(hint) if is_typeddict(part)]
        for part in nested:
            yield from fields(part, f"{prefix}{name}.")
        if not nested:
            yield prefix + name, {"required": required, "values": sorted(set(values(hint)))}


def parts(hint: Any) -> Iterator[Any]:
    """Yield a type and all that it is made of, except the values of a Literal."""
    yield hint
    if get_origin(hint) is not Literal:
        for part in get_args(hint):
            yield from parts(part)


def values(hint: Any) -> Iterator[Any]:
    """Yield the literal values that a type names."""
    for part in parts(hint):
        if get_origin(part) is Literal:
            yield from get_args(part)


def endpoint_fields(module_name: str, class_name: str) -> dict[str, dict[str, Any]]:
    """Return the fields of one endpoint; its two types differ in the value of `stream`."""
    module = importlib.import_module(f"{PACKAGE}.types.{module_name}")
    found = dict(fields(getattr(module, f"{class_name}NonStreaming")))
    streaming = dict(fields(getattr(module, f"{class_name}Streaming")))
    found["stream"]["values"] += streaming["stream"]["values"]
    return found


def text(record: dict[str, Any]) -> str:
    """Return the record as JSON with one field a line."""
    endpoints = []
    for endpoint, found in record["endpoints"].items():
        rows = [f"      {json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found)]
        endpoints.append(f'    "{endpoint}": {{\n' + ",\n".join(rows) + "\n    }")
    head = [f'  "{name}": "{record[name]}"' for name in ("package", "version", "date")]
    body = '  "endpoints": {\n' + ",\n".join(endpoints) + "\n  }"
    return "{\n" + ",\n".join([*head, body]) + "\n}\n"


def main() -> None:
    """Write the record."""
    record = {
        "package": PACKAGE,
        "version": version(PACKAGE),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "endpoints": {name: endpoint_fields(*place) for name, place in ENDPOINTS.items()},
    }
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(text(record), encoding="utf-8")


if __name__ == "__main__":
    main()
