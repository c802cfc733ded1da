"""Generated JSON schemas and regexes, and whether an answer follows one.

Everything comes from a seed. Strings, arrays and objects are bounded, so that answers end. What
is asked for is what both grammar libraries enforce.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from typing import Any, Literal

WORDS = (
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heron",
    "inlet",
    "juniper",
    "krill",
    "lagoon",
    "maple",
    "night",
    "onyx",
    "pearl",
    "quartz",
    "river",
    "slate",
    "tundra",
    "umber",
    "vale",
    "willow",
    "yarrow",
    "zephyr",
)
PATTERNS = (
    r"^[A-Z]{2}-[0-9]{3,5}$",
    r"^[a-z]{3,8}@[a-z]{3,8}\.(com|org|net)$",
    r"^#[0-9a-f]{6}$",
    r"^(0[1-9]|1[0-2])/[0-9]{2}$",
    r"^[A-Z][a-z]{2,9}( [A-Z][a-z]{2,9})?$",
    r"^v[0-9]{1,2}(\.[0-9]{1,2}){2}$",
)
FORMATS = ("date", "uuid", "ipv4")
MAX_DEPTH = 3


@dataclass(frozen=True)
class Case:
    """What an answer is to follow: the text of a schema or of a regex."""

    kind: Literal["json_schema", "regex"]
    text: str

    def problem(self, answer: str) -> str | None:
        """Why the answer does not follow it; None if it does."""
        if self.kind == "regex":
            follows = re.fullmatch(self.text, answer, re.ASCII)
            return None if follows else f"{answer!r} does not match"
        import jsonschema_rs

        try:
            value = json.loads(answer)
            errors = list(jsonschema_rs.validator_for(json.loads(self.text)).iter_errors(value))
        except ValueError as error:  # not JSON, or with half a character in it
            return f"{answer!r}: {error}"
        return f"{answer!r}: {errors[0]}" if errors else None


def cases(seed: int, schemas: int, regexes: int) -> list[Case]:
    """All schemas, then all regexes; a smaller number gives the first of them."""
    of_schemas, of_regexes = random.Random(f"{seed} schemas"), random.Random(f"{seed} regexes")
    return [schema_case(of_schemas) for _ in range(schemas)] + [
        regex_case(of_regexes) for _ in range(regexes)
    ]


def schema_case(rng: random.Random) -> Case:
    """An object, at times one that refers to a part which it defines."""
    schema = _object(rng, 0)
    if rng.random() < 0.2:
        schema["$defs"] = {"part": _object(rng, MAX_DEPTH - 1)}
        name = rng.choice(WORDS) + "_ref"
        schema["properties"][name] = {"$ref": "#/$defs/part"}
        schema["required"] = [*schema["required"], name]
    return Case("json_schema", json.dumps(schema))


def regex_case(rng: random.Random) -> Case:
    return Case("regex", "".join(_regex_part(rng) for _ in range(rng.randint(1, 4))))


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    makers = [_string, _number, _choice, _literal, _nullable]
    if depth < MAX_DEPTH:
        makers += [_object, _array, _union]
    made: dict[str, Any] = rng.choice(makers)(rng, depth)
    if rng.random() < 0.2:
        made["description"] = f"of the {rng.choice(WORDS)}"
    return made


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(1, 5 - depth))
    return {
        "type": "object",
        "properties": {name: _schema(rng, depth + 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    most = least + rng.randint(0, 2)
    return {
        "type": "array",
        "items": _schema(rng, depth + 1),
        "minItems": least,
        "maxItems": max(most, 1),
    }


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    how = rng.randrange(3)
    if how == 0:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if how == 1:
        return {"type": "string", "format": rng.choice(FORMATS)}
    least = rng.randint(0, 4)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(1, 20)}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(-1000, 1000)
    return {
        "type": rng.choice(["integer", "number"]),
        "minimum": least,
        "maximum": least + rng.randint(1, 10_000),
    }


def _choice(rng: random.Random, depth: int) -> dict[str, Any]:
    values: list[Any] = rng.sample(WORDS, rng.randint(1, 5))
    if rng.random() < 0.3:
        values += [rng.randint(0, 99), None, True]
    return {"enum": values}


def _literal(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice([{"type": "boolean"}, {"const": rng.choice(WORDS)}, {"type": "null"}])


def _nullable(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_string(rng, depth), {"type": "null"}]}


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(rng, depth + 1) for _ in range(rng.randint(2, 3))]}


def _regex_part(rng: random.Random) -> str:
    least = rng.randint(1, 3)
    count = f"{{{least},{least + rng.randint(0, 4)}}}"
    word = rng.choice(WORDS)
    return rng.choice(
        [
            f"[0-9]{count}",
            f"[a-f]{count}",
            f"[A-Z][a-z]{count}",
            f"({'|'.join(rng.sample(WORDS, 3))})",
            f"({word}[-_ ])?",
            rf"{word}\.",
            f"([0-9a-z]{count},){{0,3}};",
            "[^a-z\\n]" + count,
        ]
    )
