"""The Kubernetes examples: no cluster here, but what refers to something else is checked."""

from __future__ import annotations

import base64
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from npu_qat.cli import build_parser
from npu_qat.config import Recipe, load_run, preset_names
from tests.cluster.test_launch_script import script
from tests.training.launching import ROOT

FOLDER = ROOT / "examples" / "kubernetes"
ASCEND = sorted(FOLDER.glob("ascendjob-*.yaml"))
FILES = sorted(FOLDER.glob("*.yaml"))
# What Huawei's samples and device plugins name (read).
RESOURCES = {"950": ("huawei.com/npu", 8), "a2": ("huawei.com/Ascend910", 8)}
RESOURCES["a3"] = ("huawei.com/Ascend910", 16)
IMAGES = {"950": "npu-qat:npu-950", "a2": "npu-qat:npu-910b", "a3": "npu-qat:npu-a3"}


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod specifications of a job."""
    if document["kind"] == "AscendJob":
        return [r["template"]["spec"] for r in document["spec"]["replicaSpecs"].values()]
    return [document["spec"]["template"]["spec"]] if document["kind"] == "Job" else []


def every_pod() -> list[tuple[str, dict[str, Any]]]:
    return [(p.name, pod) for p in FILES for document in documents(p) for pod in pods(document)]


def job_of(container: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Options of the launch script, and the command of npu-qat."""
    args = container["args"]
    assert args[0] == "launch_multinode.sh"
    cut = args.index("--")
    return args[1:cut], args[cut + 1 :]


def test_there_is_an_example_for_every_chip() -> None:
    assert [path.stem.removeprefix("ascendjob-") for path in ASCEND] == sorted(RESOURCES)
    assert len(every_pod()) == 7


@pytest.mark.parametrize("path", ASCEND, ids=lambda path: path.stem)
def test_an_ascend_job_has_what_the_operator_looks_for(path: Path) -> None:
    chip = path.stem.removeprefix("ascendjob-")
    resource, count = RESOURCES[chip]
    (job,) = documents(path)
    assert job["apiVersion"] == "mindxdl.gitee.com/v1"
    assert job["spec"]["schedulerName"] == "volcano"
    assert job["metadata"]["labels"]["framework"] == "pytorch"
    replicas = job["spec"]["replicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    wanted = sum(r["replicas"] for r in replicas.values())
    assert job["spec"]["runPolicy"]["schedulingPolicy"]["minAvailable"] == wanted == 2
    for pod in pods(job):
        (container,) = pod["containers"]
        assert container["name"] == "ascend" and container["image"] == IMAGES[chip]
        assert container["ports"] == [{"name": "ascendjob-port", "containerPort": 2222}]
        for kind in ("requests", "limits"):
            assert container["resources"][kind] == {resource: count}
        (seen,) = [e for e in container["env"] if e["name"] == "ASCEND_VISIBLE_DEVICES"]
        assert seen["valueFrom"]["fieldRef"]["fieldPath"] == f"metadata.annotations['{resource}']"
        rule = pod["affinity"]["podAntiAffinity"]
        (term,) = rule["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["labelSelector"]["matchExpressions"][0]["values"] == [job["metadata"]["name"]]
        assert f"--output=/runs/{job['metadata']['name']}" in container["args"]


@pytest.mark.parametrize("path", ASCEND, ids=lambda path: path.stem)
def test_the_operators_variables_and_the_arguments_make_a_launch(path: Path) -> None:
    (job,) = documents(path)
    _, count = RESOURCES[path.stem.removeprefix("ascendjob-")]
    for rank, pod in enumerate(pods(job)):
        options, command = job_of(pod["containers"][0])
        done = script(
            "--dry-run", *options, "--", *command, MASTER_ADDR="127.0.0.1", MASTER_PORT="2222",
            RANK=str(rank), WORLD_SIZE=str(2 * count), LOCAL_WORLD_SIZE=str(count),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        words = shlex.split(done.stdout)
        world = json.loads(base64.urlsafe_b64decode(words[words.index("--world_info") + 1]))
        assert [len(devices) for devices in world.values()] == [count, count]
        assert words[words.index("--node_rank") + 1] == str(rank)


def test_an_indexed_job_names_its_first_pod_as_the_master() -> None:
    service, job = documents(FOLDER / "indexed-job.yaml")
    spec, name = job["spec"], job["metadata"]["name"]
    (pod,) = pods(job)
    (container,) = pod["containers"]
    variables = {e["name"]: e["value"] for e in container["env"]}
    assert service["kind"] == "Service" and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    assert spec["completionMode"] == "Indexed"
    options, command = job_of(container)
    assert spec["completions"] == spec["parallelism"] == int(options[options.index("--nodes") + 1])
    done = script("--dry-run", *options, "--", *command, **variables, JOB_COMPLETION_INDEX="1")
    assert done.returncode == 0 and "--node_rank 1" in done.stdout, done.stderr
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "Ignore" and rule["onExitCodes"]["values"] == [75]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert spec["backoffLimit"] > 0, "every other failure is tried again, so often"
    assert pod["restartPolicy"] == "Never", "a failure policy needs it"


@pytest.mark.parametrize(("name", "pod"), every_pod())
def test_every_mount_has_a_volume_and_every_volume_a_source(name: str, pod: dict[str, Any]) -> None:
    defined = {d["metadata"]["name"] for d in documents(FOLDER / "volumes.yaml")}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["name"] for c in pod["containers"] for mount in c["volumeMounts"]}
    assert mounted == set(volumes)
    for volume in volumes.values():
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        settings = volume.get("configMap", {}).get("name")
        if claim or settings:
            assert {claim, settings} - {None} <= defined, name
    assert pod["terminationGracePeriodSeconds"] >= 60, "a stop writes a checkpoint first"


@pytest.mark.parametrize(("name", "pod"), every_pod())
def test_a_pod_is_asked_for_a_sign_of_life(name: str, pod: dict[str, Any]) -> None:
    probe = pod["containers"][0]["livenessProbe"]
    program, *words = probe["exec"]["command"]
    args = build_parser().parse_args(words)
    assert (program, words[0], args.file) == ("npu-qat", "healthcheck", None)
    assert args.max_age >= 600, "as compose.yaml's"
    assert probe["initialDelaySeconds"] > 300, "--wait of the launch script"
    assert probe["timeoutSeconds"] >= 10, "it starts a Python; Kubernetes' own default is 1 second"


@pytest.mark.parametrize(("name", "pod"), every_pod())
def test_every_command_is_one_of_the_program_and_can_resume(name: str, pod: dict[str, Any]) -> None:
    _, command = job_of(pod["containers"][0])
    args = build_parser().parse_args(command)
    assert args.resume == "auto" and args.output.startswith("/runs/")
    assert args.preset in (None, *preset_names()) and (args.preset or args.config)
    mounts = [m["mountPath"] for c in pod["containers"] for m in c["volumeMounts"]]
    for path in filter(None, (args.config, args.output)):
        assert any(path.startswith(mount) for mount in mounts), path


def test_the_configuration_in_the_map_is_one(tmp_path: Path) -> None:
    settings = next(d for d in documents(FOLDER / "volumes.yaml") if d["kind"] == "ConfigMap")
    assert list(settings["data"]) == ["run.yaml"]
    (tmp_path / "run.yaml").write_text(settings["data"]["run.yaml"])
    config = load_run(tmp_path / "run.yaml").config
    assert config.model.path == "/models/Qwen2.5-1.5B-Instruct"
    assert config.quant == Recipe(), "the numbers of the operators that serve"


def test_every_image_is_one_that_compose_builds() -> None:
    compose = (ROOT / "compose.yaml").read_text()
    named = set(re.findall(r"^\s*image: (\S+)", compose, re.MULTILINE))
    built = {n.replace("${NPU_SOC:-950}", soc) for n in named for soc in ("950", "a3", "910b")}
    used = {c["image"] for _, pod in every_pod() for c in pod["containers"]}
    assert used <= built
