"""Check Kubernetes files without Kubernetes: built-in kinds, KubeRay's kinds, kustomize's file; unknown keys are errors.

python cluster/kubernetes/check_manifests.py [--crds FOLDER] FILE ...

Built-in kinds are checked by kubernetes-validate, whose wheel holds the schemas of many versions of Kubernetes. Those of
KubeRay are checked by `schemas/ray-v1.yaml`. To compare files and schema with KubeRay's own definitions
(`helm-chart/kuberay-operator/crds` in its repository), name their folder by --crds.
"""

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

OLDEST_KUBERNETES = "1.30"
NEWEST_KUBERNETES = "1.37"

_SCHEMA_PATH = Path(__file__).parent / "schemas" / "ray-v1.yaml"
_CRD_FILES = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}


def load_documents(path: Path) -> list[dict[str, Any]]:
    """Return the documents of a file, the empty ones left out."""
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def find_errors(document: dict[str, Any], *, crds: Path | None = None) -> list[str]:
    """Return the errors of one document, a sentence each with the place. Empty: it is valid.

    Args:
        document: content between two `---`.
        crds: folder with KubeRay's definitions.
    """
    kind = document.get("kind", "")
    if kind in load_schema()["$defs"]:
        errors = _describe(ray_validator(kind), document)
        if crds is not None and kind in _CRD_FILES:
            errors += [f"{error} (KubeRay's definition)" for error in _describe(crd_validator(crds, kind), document)]
        return errors
    errors = []
    for version in (OLDEST_KUBERNETES, NEWEST_KUBERNETES):
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            errors.append(f"{_place(error.path)}: {error.message} (Kubernetes {version})")
        except kubernetes_validate.SchemaNotFoundError as error:
            errors.append(f"{error.message}")
        except KeyError as error:
            errors.append(f"the document has no {error}")
    return errors


@functools.cache
def load_schema() -> dict[str, Any]:
    """Return the schema of KubeRay's kinds."""
    schema: dict[str, Any] = yaml.safe_load(_SCHEMA_PATH.read_text(encoding="utf-8"))
    return schema


@functools.cache
def ray_validator(kind: str) -> Draft202012Validator:
    """Return the validator of a RayCluster, a RayJob or a Kustomization."""
    schema = load_schema()
    definitions = schema_contents(
        f"kubernetes-json-schema/v{NEWEST_KUBERNETES}.0-local-strict/_definitions.json", NEWEST_KUBERNETES
    )
    registry = Registry().with_resources(
        (resource["$id"], Resource.from_contents(resource)) for resource in (schema, definitions)
    )
    return Draft202012Validator({"$ref": f"{schema['$id']}#/$defs/{kind}"}, registry=registry)


@functools.cache
def crd_validator(folder: Path, kind: str) -> Draft202012Validator:
    """Return a strict validator of a kind, made from KubeRay's own definition."""
    return Draft202012Validator(_strict(_crd_schema(folder, kind)))


def find_unknown_keys(folder: Path) -> list[str]:
    """Return the keys that our schema allows and KubeRay's definition does not know."""
    schema = load_schema()["$defs"]
    return [
        f"{kind}: {place}"
        for kind in _CRD_FILES
        for place in _unknown(schema[kind], _crd_schema(folder, kind), schema, kind)
    ]


def _describe(validator: Draft202012Validator, document: dict[str, Any]) -> list[str]:
    errors = []
    for error in sorted(validator.iter_errors(document), key=lambda found: list(map(str, found.path))):
        cause = best_match(error.context) if error.context else error
        errors.append(f"{_place(cause.absolute_path)}: {cause.message[:300]}")
    return errors


def _place(path: Any) -> str:
    return ".".join(map(str, path)) or "at the top"


def _crd_schema(folder: Path, kind: str) -> dict[str, Any]:
    (definition,) = load_documents(folder / _CRD_FILES[kind])
    (version,) = (version for version in definition["spec"]["versions"] if version["name"] == "v1")
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


def _strict(schema: Any) -> Any:
    """Turn Kubernetes' OpenAPI into JSON Schema, in which an object with named keys allows no others."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: _strict(value) for key, value in schema.items() if key not in ("properties", "format", "default")}
    if "properties" in schema:
        result["properties"] = {name: _strict(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    return result


def _unknown(ours: dict[str, Any], theirs: dict[str, Any], definitions: dict[str, Any], place: str) -> Iterator[str]:
    reference = ours.get("$ref", "")
    if reference.startswith("#/$defs/"):
        ours = definitions[reference.removeprefix("#/$defs/")] | {k: v for k, v in ours.items() if k != "$ref"}
    if "$ref" in ours:
        return  # Kubernetes' own part
    if "items" in ours:
        yield from _unknown(ours["items"], theirs["items"], definitions, f"{place}[]")
    for name, part in ours.get("properties", {}).items():
        if name not in theirs["properties"]:
            yield f"{place}.{name}"
            continue
        known = theirs["properties"][name]
        if "type" in part and part["type"] != known.get("type"):
            yield f"{place}.{name} has the type {known.get('type')}, not {part['type']}"
        yield from _unknown(part, known, definitions, f"{place}.{name}")


def main(arguments: list[str]) -> int:
    """Check the files; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--crds", type=Path, metavar="FOLDER", help="KubeRay's definitions, to compare with")
    parsed = parser.parse_args(arguments)
    errors, checked = [], 0
    for path in parsed.files:
        try:
            documents = load_documents(path)
        except (OSError, yaml.YAMLError) as error:
            errors.append(f"{path}: {error}")
            continue
        for document in documents:
            checked += 1
            name = f"{path}: {document.get('kind')} {document.get('metadata', {}).get('name', '')}".rstrip()
            errors += [f"{name}: {error}" for error in find_errors(document, crds=parsed.crds)]
    if parsed.crds is not None:
        errors += [f"{_SCHEMA_PATH}: KubeRay does not know {place}" for place in find_unknown_keys(parsed.crds)]
    for error in errors:
        sys.stderr.write(f"{error}\n")
    if not errors:
        sys.stdout.write(f"{checked} documents in {len(parsed.files)} files are valid\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
