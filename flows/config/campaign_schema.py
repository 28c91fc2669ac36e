"""The campaign file as a JSON schema, by which editors complete and check it while it is written."""

from typing import Any

from flows.config.campaign_file import Campaign

SCHEMA_FILE = "campaign.schema.json"
"""Beside a campaign file, where its first line names it."""


def campaign_schema() -> dict[str, Any]:
    """The schema of what `load_campaign` reads, short forms included."""
    schema = Campaign.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "mergequest campaign"}
    for model in (schema, *schema["$defs"].values()):
        for name, part in model.get("properties", {}).items():
            # a section that is left empty has its defaults
            if "$ref" in part and name not in model.get("required", ()):
                part["anyOf"] = [{"$ref": part.pop("$ref")}, {"type": "null"}]
    members = schema["properties"]["members"]
    members["patternProperties"] = {
        pattern: {"anyOf": [{"type": "string"}, member]} for pattern, member in members["patternProperties"].items()
    }
    for named in (members, schema["properties"]["tasks"]):
        named["additionalProperties"] = False
    methods = schema["$defs"]["SearchSettings"]["properties"]["methods"]
    spec = {"anyOf": [methods["additionalProperties"], {"type": "null"}]}
    schema["$defs"]["SearchSettings"]["properties"]["methods"] = {
        "description": methods["description"],
        "anyOf": [
            {"type": "object", "additionalProperties": spec, "minProperties": 1},
            {"type": "array", "items": {"type": "string"}, "minItems": 1},
        ],
    }
    return schema
