"""The datasets that a config names."""

from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from torchtune_vl._torchtune import instantiate
from torchtune_vl.datasets import Mixture
from torchtune_vl.recipes._config_keys import SOURCE_KEYS


def datasets_of(config: DictConfig, key: str, transform: Any) -> Mixture:
    """Make the dataset, or the list of datasets, of a key of the recipe's config."""
    entries = config[key] if isinstance(config[key], ListConfig) else [config[key]]
    names = [str(entry.get("name", number)) for number, entry in enumerate(entries)]
    own = [{k: v for k, v in entry.items() if k not in SOURCE_KEYS} for entry in entries]
    datasets = [instantiate(OmegaConf.create(entry), transform) for entry in own]
    weights, epochs = ([entry.get(k) for entry in entries] for k in ("weight", "epochs"))
    temperature = config.sampling_temperature if key == "dataset" else 1.0
    return Mixture(datasets, names, weights, epochs, temperature)
