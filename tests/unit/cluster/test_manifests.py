"""Kubernetes, `ray up` and Slurm files: what schemas cannot see; and that the validation refuses what is wrong."""

import copy
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.kubernetes.check_manifests import find_errors, load_documents
from hvp_ray.cli.command_line import parse_run
from hvp_ray.config import RunConfig
from hvp_ray.launch.placement import TRAINER_LABEL, VIEW_LABEL

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "cluster" / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))
DOCUMENTS = [document for path in FILES for document in load_documents(path)]
IMAGES = {"hvp_ray:latest", "hvp_ray_database:latest"}
# Made by hand, by KubeRay, by Kubernetes: README.md tells of each.
SECRETS_OUTSIDE = {"hvp-ray-ca", "hvp-ray-database", "hvp-ray-mlflow"}
CONFIG_MAPS_OUTSIDE = {"kube-root-ca.crt"}


def _of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [document for document in DOCUMENTS if document["kind"] in kinds]


def _document(kind: str, name: str) -> dict[str, Any]:
    (found,) = [d for d in _of_kind(kind) if d["metadata"]["name"] == name]
    return found


def _cluster_specs() -> dict[str, dict[str, Any]]:
    clusters = {d["metadata"]["name"]: d["spec"] for d in _of_kind("RayCluster")}
    return clusters | {d["metadata"]["name"]: d["spec"]["rayClusterSpec"] for d in _of_kind("RayJob")}


def _groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def _pods() -> dict[str, dict[str, Any]]:
    """Return every pod template, by a name for messages."""
    pods = {
        f"{d['kind']} {d['metadata']['name']}": d["spec"]["template"] for d in _of_kind("Deployment", "StatefulSet")
    }
    for name, spec in _cluster_specs().items():
        pods |= {f"{name} {group.get('groupName', 'head')}": group["template"] for group in _groups(spec)}
    return pods | {f"{d['metadata']['name']} submitter": d["spec"]["submitterPodTemplate"] for d in _of_kind("RayJob")}


def _containers() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, pod in _pods().items():
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            yield f"{name}: {container['name']}", container
    for name, spec in _cluster_specs().items():
        if spec["enableInTreeAutoscaling"]:  # KubeRay adds a container with these settings to the head's pod
            yield f"{name}: autoscaler", spec["autoscalerOptions"] | {"image": "hvp_ray:latest"}


def _values(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _values(value, (*path, str(key)))
    elif isinstance(node, list):
        for value in node:
            yield from _values(value, path)
    else:
        yield path, node


def _bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 2**20, "Gi": 2**30}[unit]


def _resources(group: dict[str, Any]) -> dict[str, int]:
    """Custom resources of a group, as bash and `ray start` would read them."""
    text = group["rayStartParams"].get("resources")
    return json.loads(shlex.split(text)[0]) if text else {}


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


# ---- the validation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_file_is_valid(path: Path) -> None:
    assert [error for document in load_documents(path) for error in find_errors(document)] == []


def _ray_cluster() -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(_document("RayCluster", "hvp-ray")))  # resolves YAML's anchors
    return copied


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        ("spec.workerGroupSpecs.0", "minReplica", 1, "minReplica"),
        ("spec.workerGroupSpecs.0", "minReplicas", "one", "not of type 'integer'"),
        ("spec.workerGroupSpecs.0.rayStartParams", "num-cpus", 4, "not of type 'string'"),
        ("spec", "rayVersions", "2.60.0", "rayVersions"),
        ("spec.authOptions", "mode", "disabled", "token"),
        ("spec.autoscalerOptions", "version", "v3", "v3"),
        ("spec.headGroupSpec", "serviceType", "LoadBalancer", "LoadBalancer"),
        ("spec.headGroupSpec.template.spec.containers.0", "imagePullPolicies", "Never", "imagePullPolicies"),
        ("spec.headGroupSpec.template.spec.securityContext", "runAsUser", "hvp", "'hvp'"),
        ("metadata", "name", "HVP", "HVP"),
    ],
)
def test_validation_refuses_a_wrong_ray_cluster(place: str, key: str, value: Any, message: str) -> None:
    document = _ray_cluster()
    node: Any = document
    for step in place.split("."):
        node = node[int(step)] if step.isdigit() else node[step]
    node[key] = value
    errors = find_errors(document)
    assert len(errors) == 1
    assert place in errors[0]
    assert message in errors[0]


@pytest.mark.parametrize(
    ("kind", "name", "change", "message"),
    [
        ("RayJob", "hvp-ray-first-run", {"submissionMode": "K8sJob"}, "K8sJob"),
        ("RayJob", "hvp-ray-first-run", {"ttlSecondsAfterFinish": 1}, "ttlSecondsAfterFinish"),
        ("RayJob", "hvp-ray-first-run", {"shutdownAfterJobFinishes": "yes"}, "boolean"),
        ("Deployment", "mlflow", {"replica": 2}, "replica"),
        ("Deployment", "mlflow", {"replicas": "two"}, "'two'"),
        ("NetworkPolicy", "ray", {"ingres": []}, "ingres"),
    ],
)
def test_validation_refuses_other_wrong_kinds(kind: str, name: str, change: dict[str, Any], message: str) -> None:
    document = copy.deepcopy(_document(kind, name))
    document["spec"] |= change
    errors = find_errors(document)
    assert errors
    assert all(message in error for error in errors)


def test_validation_refuses_unknown_kinds() -> None:
    assert find_errors({"apiVersion": "apps/v1", "kind": "Deploymint", "metadata": {"name": "x"}})
    assert find_errors({"kind": "Service"})


def test_check_manifests_says_what_is_wrong_and_exits_with_one(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((FOLDER / "ray-cluster.yaml").read_text().replace("minReplicas: 1", "minReplica: 1", 1))
    program = [sys.executable, "-B", str(FOLDER / "check_manifests.py"), str(wrong)]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "'minReplica' was unexpected" in result.stderr
    assert result.stdout == ""


def test_scripts_parse_and_can_be_executed() -> None:
    for script in sorted((ROOT / "cluster").glob("*.sh")):
        assert script.stat().st_mode & stat.S_IXUSR, script
        subprocess.run(["bash", "-n", str(script)], check=True)


# ---- rights and secrets ---------------------------------------------------------------------------------------------


def test_images_are_those_of_the_dockerfile() -> None:
    assert {container["image"] for _, container in _containers()} == IMAGES
    (kustomization,) = _of_kind("Kustomization")
    assert {f"{image['name']}:{image['newTag']}" for image in kustomization["images"]} == IMAGES


def test_no_secret_is_written_down() -> None:
    assert not _of_kind("Secret")
    for path, value in (pair for document in DOCUMENTS for pair in _values(document)):
        assert not re.search(r"(?i)-----BEGIN|[0-9a-f]{32}|://[^/\s]+:[^/\s]+@", str(value)), path
    for name, container in _containers():
        for variable in container.get("env", []):
            if re.search(r"PASSWORD|TOKEN|SECRET|USERNAME", variable["name"]):
                assert "value" not in variable, (name, variable["name"])
                assert variable["valueFrom"]["secretKeyRef"]["name"] in SECRETS_OUTSIDE


@pytest.mark.parametrize("name", list(_pods()))
def test_pods_run_as_a_user_without_rights(name: str) -> None:
    spec = _pods()[name]["spec"]
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 1000
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    allowed = {"name", "emptyDir", "persistentVolumeClaim", "projected", "secret"}  # no hostPath
    assert all(set(volume) <= allowed for volume in spec["volumes"])


def test_containers_can_gain_nothing_and_write_only_where_told() -> None:
    for name, container in _containers():
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["readOnlyRootFilesystem"] is True, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert not context.get("privileged"), name
        assert "runAsUser" not in context, name
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"], name
        assert {"requests", "limits"} <= set(container["resources"]), name


@pytest.mark.parametrize("name", [name for name in _pods() if "submitter" not in name])
def test_certificate_is_made_for_the_pod_and_its_authority_is_seen_nowhere_else(name: str) -> None:
    spec = _pods()[name]["spec"]
    (maker,) = spec["initContainers"]
    folder, certificate = maker["command"][1:3]
    assert maker["command"][0] == "/opt/hvp_ray/cluster/make_certificate.sh"
    made = {f"{folder}/ca.crt", f"{folder}/{certificate}.crt", f"{folder}/{certificate}.key"}
    for container in spec["containers"]:
        assert not any(mount["name"] == "authority" for mount in container["volumeMounts"])
        variables = {variable["name"]: variable.get("value") for variable in container["env"]}
        read = {value for key, value in variables.items() if key.startswith("RAY_TLS_")}
        if read:
            assert read == made
            assert variables["RAY_USE_TLS"] == "1"
            assert maker["args"][0] == "$(POD_IP)"
        else:
            assert variables["HVP_TLS"] == folder
            script = (ROOT / "cluster" / Path(container["command"][0]).name).read_text()
            assert {f"{folder}/{file}" for file in re.findall(r"\$tls/([\w.]+)", script)} <= made


def test_only_the_autoscaler_may_ask_kubernetes() -> None:
    users = [name for name, c in _containers() if any(m["name"] == "kubernetes-api" for m in c["volumeMounts"])]
    assert users == ["hvp-ray: autoscaler"]


def test_mounts_have_volumes_and_volumes_have_sources() -> None:
    claims = {document["metadata"]["name"] for document in _of_kind("PersistentVolumeClaim")}
    readme = (FOLDER / "README.md").read_text()
    assert all(f"`{secret}`" in readme for secret in SECRETS_OUTSIDE)
    for name, pod in _pods().items():
        spec = pod["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        templates = [
            claim["metadata"]["name"]
            for document in _of_kind("StatefulSet")
            if document["spec"]["template"] is pod
            for claim in document["spec"]["volumeClaimTemplates"]
        ]
        containers = [*spec["containers"], *spec.get("initContainers", [])]
        mounted = {mount["name"] for container in containers for mount in container["volumeMounts"]}
        if "kubernetes-api" in volumes:
            mounted |= {"kubernetes-api"}  # in the container that KubeRay adds
        assert mounted == set(volumes) | set(templates), name
        for path, value in _values(spec):
            if path[-1] == "claimName":
                assert value in claims, (name, value)
            if path[-1] == "secretName" or path[-2:] in (("secret", "name"), ("secretKeyRef", "name")):
                assert value in SECRETS_OUTSIDE, (name, value)
            if path[-2:] == ("configMap", "name"):
                assert value in CONFIG_MAPS_OUTSIDE, (name, value)


def test_secret_files_are_those_that_the_scripts_read() -> None:
    for pod, script in (("Deployment mlflow", "start_mlflow.sh"), ("StatefulSet database", "start_database.sh")):
        spec = _pods()[pod]["spec"]
        (container,) = spec["containers"]
        assert Path(container["command"][0]).name == script
        (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "secrets"]
        assert mount == {"name": "secrets", "mountPath": "/run/secrets", "readOnly": True}
        given = {value for path, value in _values(spec["volumes"]) if path[-1] == "path"}
        read = set(re.findall(r"\$secrets/(\w+)", (ROOT / "cluster" / script).read_text()))
        assert given == read, script


# ---- the Ray clusters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(_cluster_specs()))
def test_ray_version_is_that_of_the_lock(name: str) -> None:
    (locked,) = re.findall(r"(?m)^ray==(\S+)", (ROOT / "requirements.lock").read_text())
    assert _cluster_specs()[name]["rayVersion"] == locked == ray.__version__


@pytest.mark.parametrize("name", list(_cluster_specs()))
def test_counts_labels_and_memory_of_the_groups_fit(name: str) -> None:
    spec = _cluster_specs()[name]
    labels = {"views": {VIEW_LABEL}, "trainers": {TRAINER_LABEL}, "gpu": {VIEW_LABEL, TRAINER_LABEL}}
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        resources = _resources(group)
        assert set(resources) == labels[group["groupName"]]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert sum(resources.values()) <= int(limits["cpu"])
        assert ("nvidia.com/gpu" in limits) == (group["groupName"] == "gpu")
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in _groups(spec):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (shared,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shared-memory"]
        assert shared["medium"] == "Memory"
        store, size = int(group["rayStartParams"]["object-store-memory"]), _bytes(shared["sizeLimit"])
        assert store < size < _bytes(container["resources"]["limits"]["memory"]) / 2


def test_rays_autoscaler_reads_the_groups() -> None:
    document = _ray_cluster()
    document["metadata"]["namespace"] = "hvp-ray"
    types = _derive_autoscaling_config_from_ray_cr(document)["available_node_types"]
    workers = {name: kind for name, kind in types.items() if kind["max_workers"] > 0}
    assert {name: (kind["min_workers"], kind["max_workers"]) for name, kind in workers.items()} == {
        "views": (1, 8),
        "trainers": (1, 4),
        "gpu": (0, 4),
    }
    assert workers["views"]["resources"][VIEW_LABEL] == 4
    assert workers["trainers"]["resources"][TRAINER_LABEL] == 1
    assert workers["gpu"]["resources"].items() >= {"GPU": 1, TRAINER_LABEL: 1, VIEW_LABEL: 6}.items()
    (head,) = [kind for name, kind in types.items() if name not in workers]
    assert head["resources"]["CPU"] == 0


@pytest.mark.parametrize("name", list(_cluster_specs()))
def test_ray_containers_have_the_environment_and_folders(name: str) -> None:
    for group in _groups(_cluster_specs()[name]):
        (container,) = group["template"]["spec"]["containers"]
        variables = {variable["name"]: variable.get("value") for variable in container["env"]}
        wanted = {
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_TRACKING_URI": "https://mlflow:5000",
            "MLFLOW_TRACKING_SERVER_CERT_PATH": "/run/tls/ca.crt",
            "RAY_USE_TLS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "HOME": "/tmp",
        }
        if "groupName" not in group:
            wanted |= {
                "RAY_health_check_period_ms": "1000",
                "RAY_health_check_timeout_ms": "3000",
                "RAY_health_check_failure_threshold": "5",
            }
        assert variables.items() >= wanted.items()
        mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
        assert mounts == {
            "/tmp": False,
            "/dev/shm": False,
            "/opt/hvp_ray/runs": False,
            "/data": True,
            "/run/tls": True,
        }
        assert container["workingDir"] == "/opt/hvp_ray"
        assert {"readinessProbe", "livenessProbe"} <= set(container)
    assert _cluster_specs()[name]["authOptions"]["mode"] == "token"


def _entrypoint() -> tuple[dict[str, Any], RunConfig]:
    job = _document("RayJob", "hvp-ray-first-run")["spec"]
    program, script, *arguments = shlex.split(job["entrypoint"])
    assert (program, script) == ("python", "pipelines/pretrain.py")
    return job, parse_run(arguments, program="pretrain.py", description="")


def test_job_asks_for_what_its_cluster_has() -> None:
    job, config = _entrypoint()
    offered: dict[str, int] = {}
    for group in job["rayClusterSpec"]["workerGroupSpecs"]:
        for label, amount in _resources(group).items():
            offered[label] = offered.get(label, 0) + amount * group["maxReplicas"]
    assert offered == {VIEW_LABEL: config.cluster.num_view_workers, TRAINER_LABEL: config.cluster.num_trainers}


def test_retried_job_resumes() -> None:
    job, config = _entrypoint()
    assert job["backoffLimit"] > 0
    assert config.run.name is not None
    assert config.run.resume
    (container,) = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert config.run.output in [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "runs"]
    assert job["shutdownAfterJobFinishes"] is True


# ---- names across files ---------------------------------------------------------------------------------------------


def test_kustomization_lists_every_file_but_the_job() -> None:
    (kustomization,) = _of_kind("Kustomization")
    assert set(kustomization["resources"]) == {path.name for path in FILES} - {"kustomization.yaml", "ray-job.yaml"}
    assert _of_kind("Namespace")[0]["metadata"]["name"] == kustomization["namespace"]


def test_services_select_one_pod_and_its_port() -> None:
    for service in _of_kind("Service"):
        selector = {"matchLabels": service["spec"]["selector"]}
        (pod,) = [pod for pod in _pods().values() if _selects(selector, pod["metadata"]["labels"])]
        ports = {port["name"]: port["containerPort"] for c in pod["spec"]["containers"] for port in c.get("ports", [])}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    for document in _of_kind("Deployment", "StatefulSet"):
        assert _selects(document["spec"]["selector"], document["spec"]["template"]["metadata"]["labels"])
    services = {service["metadata"]["name"] for service in _of_kind("Service")}
    variables = {v["name"]: v.get("value", "") for _, container in _containers() for v in container.get("env", [])}
    assert variables["DATABASE_HOST"] in services
    assert re.fullmatch(r"https://(\w+):5000", variables["MLFLOW_TRACKING_URI"])[1] in services  # type: ignore[index]
    assert "mlflow:5000" in variables["MLFLOW_ALLOWED_HOSTS"].split(",")


def _allowed(target: dict[str, str], source: dict[str, str], port: int) -> bool:
    """Whether the policies let a pod of this namespace talk to another, both ways of looking at it."""

    def opens(policy: dict[str, Any], direction: str, side: str, other: dict[str, str]) -> bool:
        rules = policy["spec"].get(direction.lower(), [])
        return any(
            ("ports" not in rule or port in [entry["port"] for entry in rule["ports"]])
            and (side not in rule or any(_selects(peer["podSelector"], other) for peer in rule[side]))
            for rule in rules
        )

    def passes(direction: str, side: str, own: dict[str, str], other: dict[str, str]) -> bool:
        policies = [
            policy
            for policy in _of_kind("NetworkPolicy")
            if direction in policy["spec"]["policyTypes"] and _selects(policy["spec"]["podSelector"], own)
        ]
        assert policies  # the default is closed
        return any(opens(policy, direction, side, other) for policy in policies)

    return passes("Egress", "to", source, target) and passes("Ingress", "from", target, source)


def test_network_policies_open_what_is_needed_and_nothing_else() -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in _pods().items()}
    head = labels["hvp-ray head"] | {"ray.io/node-type": "head"}
    worker = labels["hvp-ray views"]
    mlflow, database = labels["Deployment mlflow"], labels["StatefulSet database"]
    submitter, stranger = labels["hvp-ray-first-run submitter"], {"app": "stranger"}
    ports = (5000, 5432, 6379, 8265, 10001, 31415)
    everybody = {"ray": worker, "head": head, "mlflow": mlflow, "database": database, "other": stranger}
    everybody["submitter"] = submitter
    found = {
        (source, target, port)
        for source, own in everybody.items()
        for target, other in everybody.items()
        for port in ports
        if _allowed(other, own, port)
    }
    ray_pods = ("ray", "head")
    wanted = {(source, target, port) for source in ray_pods for target in ray_pods for port in ports}
    wanted |= {(source, "mlflow", 5000) for source in ray_pods}
    wanted |= {("submitter", target, 8265) for target in ray_pods}
    wanted |= {("mlflow", "database", 5432)}
    assert found == wanted


# ---- ray up, Slurm --------------------------------------------------------------------------------------------------


def _ray_up() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "ray-up.yaml").read_text())
    return config


def test_ray_up_is_what_ray_expects() -> None:
    config = prepare_config(_ray_up())
    validate_config(config)
    assert config["provider"]["type"] == "local"
    assert {"~/.ray/auth_token", "~/.ray/tls/ca.crt", "~/.ray/tls/ca.key"} <= set(config["file_mounts"])
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in start
        assert "cluster/with_tls.sh ray start" in start
    labels = json.loads(re.search(r"--resources='(.*?)'", start)[1])  # type: ignore[index]
    assert set(labels) == {VIEW_LABEL, TRAINER_LABEL}


def test_ray_up_with_a_misspelt_key_is_refused() -> None:
    with pytest.raises(Exception, match="head_start_ray_command"):
        validate_config(prepare_config(_ray_up() | {"head_start_ray_command": []}))


@pytest.mark.parametrize("file", ["ray-up.yaml", "slurm.sh"])
def test_what_was_never_run_says_so_first(file: str) -> None:
    first = [line for line in (ROOT / "cluster" / file).read_text().splitlines() if not line.startswith("#!")]
    assert first[0].startswith("# NOT RUN")


_FAKES = {
    "srun": 'echo "srun $*" >> "$LOG"\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "ray": 'echo "ray $* mode=$(stat -c %a "$RAY_AUTH_TOKEN_PATH") tls=$RAY_USE_TLS key=$(stat -c %a "$RAY_TLS_SERVER_KEY")" '
    '>> "$LOG"\n'
    '[ "$1" = health-check ] || exec sleep 3\n',
    "scontrol": "printf 'first\\nsecond\\n'\n",
    "python": 'echo "python $RAY_ADDRESS $*" >> "$LOG"\n'
    'until [ "$(grep -c "^ray start" "$LOG")" = 3 ]; do sleep 0.1; done\nexit 3\n',
}


def test_slurm_script_starts_every_group_and_passes_the_exit_status_on(tmp_path: Path) -> None:
    """With programs in place of Slurm's and Ray's that write down how they were called."""
    for name, text in _FAKES.items():
        program = tmp_path / "fakes" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/usr/bin/env bash\n{text}")
        program.chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "cluster").symlink_to(ROOT / "cluster")
    log = tmp_path / "log"
    environment = {
        "PATH": f"{tmp_path / 'fakes'}:{os.environ['PATH']}",
        "LOG": str(log),
        "HVP_HEAD_IP": "192.0.2.1",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "first,second",
        "SLURM_JOB_NODELIST_HET_GROUP_1": "third,fourth",
        "SLURM_CPUS_PER_TASK_HET_GROUP_0": "4",
        "SLURM_CPUS_PER_TASK_HET_GROUP_1": "8",
    }
    bash = shutil.which("bash")
    assert bash is not None
    script = str(ROOT / "cluster" / "slurm.sh")
    result = subprocess.run(
        [bash, script, "simsiam-digits", "--run.name", "x"], env=environment, check=False, timeout=60
    )
    assert result.returncode == 3
    lines = log.read_text().splitlines()
    starts = [line for line in lines if line.startswith("ray start")]
    assert len(starts) == 3
    assert all(line.endswith("mode=600 tls=1 key=600") for line in starts)
    assert sum("--head" in line for line in starts) == 1
    assert sum('"view": 8' in line for line in starts) == 1
    (driver,) = [line for line in lines if line.startswith("python")]
    assert driver == (
        "python 192.0.2.1:20007 pipelines/pretrain.py simsiam-digits --cluster.placement labels --cluster.device cuda "
        "--cluster.num_trainers 2 --cluster.num_view_workers 16 --run.name x"
    )
    assert not any("mode=600" not in line and "token" in line for line in lines)
    assert list((tmp_path / "runs").iterdir()) == []  # the token and the authority are gone
