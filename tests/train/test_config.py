"""Settings: where they come from, which one wins, and what is refused."""

from __future__ import annotations

import pytest

from cftrain.config import load_config, presets, to_toml
from cftrain.errors import ConfigError, UnknownModelError


def test_defaults_are_the_papers_optimiser_on_a_fixed_schedule():
    train = load_config().train
    assert (train.learning_rate, train.weight_decay, train.accumulate) == (1e-4, 4e-6, 32)
    assert train.patience == 0


def test_the_preset_paper_is_the_protocol_of_the_released_code():
    config = load_config(preset="paper")
    assert (config.train.epochs, config.train.patience, config.train.alpha) == (100, 20, 0.2)
    assert (config.train.cosine_epochs, config.train.final_learning_rate) == (10, 0.0)
    assert (config.bins.count, config.bins.fitted_on) == (4, "cohort")


def test_later_sources_win_preset_then_file_then_flags_then_set(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[data]\ncohort = "FROM_FILE"\n[train]\nepochs = 3\nseed = 1\n')
    config = load_config(
        preset="paper", file=file, flags={"data.cohort": "FLAG", "data.encoder": None}, settings=["train.seed=2"]
    )
    assert config.data.cohort == "FLAG"
    assert (config.train.epochs, config.train.seed, config.train.patience) == (3, 2, 20)


def test_options_that_a_preset_has_for_its_model_are_no_other_models_and_give_way_to_later_sources(tmp_path):
    assert load_config(preset="demo").model.options["embed_dim"] == 64
    assert load_config(preset="demo", flags={"model.name": "mean-cox"}).model.options == {}
    assert load_config(preset="demo", settings=["model.embed_dim=32"]).model.options["embed_dim"] == 32
    file = tmp_path / "own.toml"
    file.write_text("[model]\nembed_dim = 16\n[crossfusion]\nembed_dim = 48\n")
    assert load_config(preset="demo", file=file).model.options["embed_dim"] == 48


@pytest.mark.parametrize("preset", [None, *presets()])
def test_the_resolved_toml_gives_the_same_configuration_back(preset, tmp_path):
    config = load_config(preset=preset, flags={"data.cohort": "A", "model.name": None}, settings=["train.epochs=9"])
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    again = load_config(file=file)
    assert to_toml(again) == to_toml(config)
    assert (again.data, again.bins, again.train, again.preset) == (
        config.data,
        config.bins,
        config.train,
        config.preset,
    )


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("train.epoch=3", "train.epochs"),
        ("epochs=3", "train.epochs"),
        ("train.learningrate=1", "train.learning_rate"),
        ("bins.number=4", "bins.count"),
        ("data.cache_mib=2048", "data.cache"),
    ],
)
def test_an_unknown_setting_is_refused_with_near_names(setting, hint):
    with pytest.raises(ConfigError, match=hint):
        load_config(settings=[setting])


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("train.epochs=many", "'many'"),
        ("train.epochs=0", "above 0"),
        ("train.epochs=2.5", "2.5"),
        ("train.alpha=2", "between 0 and 1"),
        ("train.sampling=sometimes", "weighted, uniform"),
        ("bins.count=1", "at least 2"),
        ("model.n_bins=3", "bins.count"),
        ("train.epochs", "key=value"),
        ("train.patience=-1", "negative"),
        ("data.cache=disk", r"auto, off, ram\[:SIZE\]"),
        ("data.cache=ram:lots", "8GB or 512MiB"),
        ("data.order=random", "shuffled, shard"),
        ("data.ahead_mib=0", "above 0"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_saying_what_was_found(setting, found):
    with pytest.raises(ConfigError, match=found):
        load_config(settings=[setting])


def test_unknown_models_options_and_presets_are_refused_by_name():
    with pytest.raises(UnknownModelError, match="crossfusion"):
        load_config(flags={"model.name": "crosfusion"})
    with pytest.raises(ConfigError, match="embed_dim"):
        load_config(settings=["model.embed_dims=64"])
    with pytest.raises(ConfigError, match="paper"):
        load_config(preset="papr")


def test_a_models_own_section_counts_for_that_model_alone(tmp_path):
    file = tmp_path / "several.toml"
    file.write_text("[abmil]\ndropout = 0.25\n[crossfusion]\nembed_dim = 64\n")
    models = {name: load_config(file=file, flags={"model.name": name}).model for name in ("abmil", "crossfusion")}
    assert models["abmil"].options == {"dropout": 0.25}
    assert models["crossfusion"].options == {"embed_dim": 64}
    again = load_config(
        file=file, flags={"model.name": "abmil"}, settings=["abmil.dropout=0.5", "crossfusion.n_heads=2"]
    )
    assert again.model.options == {"dropout": 0.5}
    (tmp_path / "resolved.toml").write_text(to_toml(again))
    assert "crossfusion" not in to_toml(again)
    assert load_config(file=tmp_path / "resolved.toml").model.options["dropout"] == 0.5


def test_a_models_own_section_counts_more_than_the_common_one():
    settings = ["abmil.hidden_dim=8", "model.hidden_dim=16", "model.attention_dim=4"]
    options = load_config(flags={"model.name": "abmil"}, settings=settings).model.options
    assert options == {"hidden_dim": 8, "attention_dim": 4}


@pytest.mark.parametrize(
    ("setting", "found"),
    [("abmil.dropuot=0.5", "dropout"), ("abmil.dropout=2", "below 1"), ("abmil.n_bins=3", "bins.count")],
)
def test_a_section_of_a_model_that_is_not_asked_for_is_checked_all_the_same(setting, found):
    with pytest.raises(ConfigError, match=found):
        load_config(flags={"model.name": "crossfusion"}, settings=[setting])


def test_a_broken_toml_file_is_named(tmp_path):
    file = tmp_path / "broken.toml"
    file.write_text("[train\nepochs = 3")
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load_config(file=file)


def test_an_integer_stands_for_a_float():
    assert load_config(settings=["train.learning_rate=1"]).train.learning_rate == 1.0


def test_tars_are_read_in_sequence_unless_said_otherwise():
    assert load_config().data.order == "shuffled"
    assert load_config(flags={"data.shards": "a.tar"}).data.order == "shard"
    assert load_config(flags={"data.shards": "a.tar"}, settings=["data.order=shuffled"]).data.order == "shuffled"
