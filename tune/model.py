"""The policy as a logged model of MLflow: policy.safetensors and a copy of this file, which is run to load it.

    policy = mlflow.pyfunc.load_model(f"runs:/{run_id}/policy")
    actions_NA = policy.predict(observations_NS, params={"seed": 0})

Loading wants the package `aepo`, MLflow and torch; no pickle is read. The folder is written here because MLflow's own
`log_model` runs the model first and copies the run's metrics to it, which takes a minute where they have 1,000 names.
"""

import json
import platform
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.models import Model, ModelSignature, set_model
from mlflow.pyfunc import add_to_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec
from numpy.typing import NDArray
from safetensors import safe_open

from aepo.data.episodes import flatten
from aepo.policy import Policy

NAME = "policy"
CODE, WEIGHTS = "model.py", "policy.safetensors"


class PolicyModel(PythonModel):
    """Raw observations in, actions in the environment's units out, on the CPU."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the policy; the draws of calls without a seed start here."""
        self._policy = Policy.load(context.artifacts[WEIGHTS])
        self._generator = torch.Generator().manual_seed(0)

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002  # MLflow's signature
        model_input: np.ndarray,  # the one name of arrays that MLflow knows
        params: dict[str, Any] | None = None,
    ) -> NDArray[np.float32]:
        """Return one action per observation, [N, A].

        Args:
            context: what `load_context` got.
            model_input: raw observations [N, S], or a dict of arrays [N, ...], joined as the run joined them.
            params: `seed` >= 0 draws from that seed, the same at every call; without it the draws go on.

        Raises:
            DataError: if the dict lacks an entry that the run used.
        """
        seed = int((params or {}).get("seed", -1))
        generator = self._generator if seed < 0 else torch.Generator().manual_seed(seed)
        return self._policy.act(flatten(model_input, self._policy.config.data.observation_keys), generator)


def log_model(client: MlflowClient, run_id: str, policy: Path, *, tags: Mapping[str, str], step: int) -> str:
    """Make the run's logged model, or the files of the one that it has anew, and return its id.

    Args:
        client: of the store that has the run.
        run_id: the run.
        policy: safetensors file of the run's policy.
        tags: of the model.
        step: gradient steps that the policy has seen.
    """
    entry = client.get_run(run_id)
    experiment = entry.info.experiment_id
    model = next(iter(client.search_logged_models([experiment], f"source_run_id = '{run_id}'")), None)
    if model is None:
        model = client.create_logged_model(experiment, NAME, run_id, dict(tags), model_type="policy")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), policy, run_id=run_id, model_id=model.model_id)
        client.log_model_artifacts(model.model_id, folder)
    if entry.outputs is None or not entry.outputs.model_outputs:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    client.finalize_logged_model(model.model_id, "READY")
    return model.model_id


def write_model(folder: Path, policy: Path, *, run_id: str, model_id: str) -> None:
    """Write MLmodel, code, weights, requirements and an input example, the data's mean observation.

    The signature leaves the input open: MLflow refuses float64 where float32 is written there, and dicts.
    """
    with safe_open(policy, framework="np") as file:
        mean_S, num_actions = file.get_tensor("state_mean_S"), len(file.get_tensor("action_low_A"))
    shutil.copy(__file__, folder / CODE)
    shutil.copy(policy, folder / WEIGHTS)
    packages = [f"{name}=={version(name).partition('+')[0]}" for name in ("aepo-platform", "mlflow", "torch")]
    (folder / "requirements.txt").write_text("\n".join(packages) + "\n")
    environment = f"python: {platform.python_version()}\ndependencies:\n- -r requirements.txt\n"
    (folder / "python_env.yaml").write_text(environment)
    (folder / "input_example.json").write_text(json.dumps({"inputs": [mean_S.tolist()]}))
    model = Model(
        run_id=run_id,
        model_id=model_id,
        model_uuid=model_id,
        signature=ModelSignature(
            outputs=Schema([TensorSpec(np.dtype("float32"), (-1, num_actions))]),
            params=ParamSchema([ParamSpec("seed", "long", -1)]),
        ),
        saved_input_example_info={"artifact_path": "input_example.json", "type": "ndarray", "format": "tf-serving"},
    )
    add_to_model(  # type: ignore[no-untyped-call]
        model,
        "mlflow.pyfunc.loaders.code_model",
        model_code_path=CODE,
        python_env="python_env.yaml",
        artifacts={WEIGHTS: {"path": WEIGHTS, "uri": WEIGHTS}},
        streamable=False,
    )
    model.save(str(folder / "MLmodel"))


set_model(PolicyModel())
