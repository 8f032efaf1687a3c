"""pytorch-forecasting: N-BEATS and the temporal fusion transformer, as in its tutorials, on series in a CSV file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from case import Case
from pytorch_forecasting import NBeats, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data import NaNLabelEncoder
from pytorch_forecasting.metrics import QuantileLoss

LENGTH = 60


def nbeats(data: Path) -> Case:
    """Three series, each by itself."""
    table = _table(data)

    def loaders() -> dict[str, Any]:
        training, validation = _split(table, categorical_encoders={"series": NaNLabelEncoder().fit(table["series"])})
        return _loaders(training, validation)

    def module() -> Any:
        training, _ = _split(table, categorical_encoders={"series": NaNLabelEncoder().fit(table["series"])})
        return NBeats.from_dataset(training, learning_rate=3e-3, weight_decay=1e-2, widths=[32, 64], log_interval=-1)

    return _case(module, loaders, clipped_at=0.01)


def tft(data: Path) -> Case:
    """The same with what is known of the future, in quantiles."""
    table = _table(data)
    known = {"time_varying_known_reals": ["time", "month"], "static_categoricals": ["series"]}

    def loaders() -> dict[str, Any]:
        return _loaders(*_split(table, **known))

    def module() -> Any:
        training, _ = _split(table, **known)
        return TemporalFusionTransformer.from_dataset(
            training, learning_rate=0.03, hidden_size=64, attention_head_size=2, dropout=0.1,
            hidden_continuous_size=32, loss=QuantileLoss(), log_interval=-1, reduce_on_plateau_patience=4,
        )  # fmt: skip

    return _case(module, loaders, clipped_at=0.1)


def _case(module: Callable[[], Any], loaders: Callable[[], dict[str, Any]], clipped_at: float) -> Case:
    return Case(
        module=module,
        data=loaders,
        monitor="val_loss",
        trainer={"gradient_clip_val": clipped_at},
        given=_trusting,
        resumed=_trusting(),
    )


def _table(data: Path) -> Any:
    """Write the series and read them back."""
    noise = np.random.default_rng(0)
    rows = []
    for series in range(3):
        for time in range(LENGTH):
            value = 5 + np.sin(2 * np.pi * time / (6 + series)) + 0.1 * noise.normal()
            rows.append({"series": f"s{series}", "time": time, "month": time % 12, "value": value})
    data.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(data / "series.csv", index=False)
    return pd.read_csv(data / "series.csv").astype({"month": float})


def _split(table: Any, **settings: Any) -> tuple[Any, Any]:
    until = LENGTH - 6
    training = TimeSeriesDataSet(
        table[lambda rows: rows["time"] <= until], time_idx="time", target="value", group_ids=["series"],
        max_encoder_length=12, min_encoder_length=12, max_prediction_length=4, min_prediction_length=4,
        time_varying_unknown_reals=["value"], **settings,
    )  # fmt: skip
    validation = TimeSeriesDataSet.from_dataset(training, table, min_prediction_idx=until + 1)
    return training, validation


def _loaders(training: Any, validation: Any) -> dict[str, Any]:
    return {
        "train_dataloaders": training.to_dataloader(train=True, batch_size=32, num_workers=0),
        "val_dataloaders": validation.to_dataloader(train=False, batch_size=32, num_workers=0),
    }


def _trusting() -> dict[str, Any]:
    """Let the objects among the arguments, the normalisers and losses, be made from the file."""
    return {"weights_only": False}
