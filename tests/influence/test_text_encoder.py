"""Hugging Face text encoders: windows, layouts, training end to end, and what is kept, on tiny encoders made on the spot."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_groupmates.config import UserError
from megatron_groupmates.influence import text_encoder
from megatron_groupmates.influence.fit import FitResult, fit_relational
from megatron_groupmates.influence.fit_settings import FitSettings
from megatron_groupmates.influence.relational import RelationalModel
from megatron_groupmates.influence.text_encoder import HuggingFaceEncoder, TrainedFeatures, mean_of_windows, pass_bounds
from tests.common.distributed import run_ranks
from tests.common.text_encoders import FIRST_WORD, WORDS, detokenise, write_text_encoder

CPU = torch.device("cpu")
DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def encoder_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few tokens at a time that every batch takes several passes."""
    monkeypatch.setitem(text_encoder._TOKENS_PER_PASS, "cpu", 600)


def sample_of(num_words: int, length: int = 2500, seed: int = 0) -> torch.Tensor:
    generator = random.Random(seed)
    return torch.tensor([generator.randrange(len(WORDS)) for _ in range(num_words)] + [99] * (length - num_words))


def samples_of(*counts: int) -> torch.Tensor:
    return torch.stack([sample_of(count, seed=count) for count in counts])


def word_ids(sample: torch.Tensor) -> list[int]:
    return [FIRST_WORD + WORDS.index(word) for word in detokenise(sample.tolist()).split()]


def bert(directory: Path, attention: str = "eager") -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(directory, attn_implementation=attention).eval()


def unit_mean(vectors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([vector / vector.norm() for vector in vectors]).mean(0)


def slow_windows(directory: Path, sample: torch.Tensor, max_tokens: int, size: int = 512) -> torch.Tensor:
    """Features one window at a time, each put together by hand while tokens are left."""
    model, ids, vectors = bert(directory, "sdpa"), word_ids(sample), []
    while max_tokens > 2 and (ids or not vectors):
        body = min(size, max_tokens) - 2
        window, ids, max_tokens = ids[:body], ids[body:], max_tokens - body - 2
        vectors.append(model(input_ids=torch.tensor([[2, *window, 3]])).last_hidden_state[0, 0])
    return unit_mean(vectors)


def slow_cut(directory: Path, sample: torch.Tensor, max_tokens: int) -> torch.Tensor:
    """Features in the authors' layout: special tokens once, padded to the maximum, cut, all windows in one batch of 512 tokens."""
    ids = [2, *word_ids(sample)[: max_tokens - 2], 3]
    padded = torch.tensor(ids + [0] * (max_tokens - len(ids))).view(-1, 512)
    mask = (torch.arange(max_tokens) < len(ids)).long().view(-1, 512)
    return unit_mean(list(bert(directory)(input_ids=padded, attention_mask=mask).last_hidden_state[:, 0]))


COUNTS = (0, 3, 509, 510, 511, 1021, 1150, 2040, 2041, 2400)


class TestLayouts:
    @pytest.mark.parametrize("max_tokens", [2048, 700, 100])
    @torch.no_grad()
    def test_windows_equal_the_slow_version(self, encoder_directory, max_tokens):
        encoder = HuggingFaceEncoder(str(encoder_directory), detokenise, max_tokens, CPU)
        assert encoder.feature_dim == 16
        samples = samples_of(*COUNTS)
        features = encoder.encode(samples)
        assert features.shape == (len(COUNTS), 16) and features.dtype == torch.float32 and not features.requires_grad
        expected = [slow_windows(encoder_directory, sample, max_tokens) for sample in samples]
        torch.testing.assert_close(features, torch.stack(expected), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("max_tokens", [2048, 1024, 512])
    @torch.no_grad()
    def test_cut_equals_the_slow_version(self, encoder_directory, max_tokens):
        encoder = HuggingFaceEncoder(str(encoder_directory), detokenise, max_tokens, CPU, "cut")
        samples = samples_of(*COUNTS)
        expected = [slow_cut(encoder_directory, sample, max_tokens) for sample in samples]
        torch.testing.assert_close(encoder.encode(samples), torch.stack(expected), rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_windows_of_padding_attend_uniformly(self, encoder_directory):
        """What older transformers computed for them, by hand: each value counts alike, and all are those of padding."""
        encoder, model = HuggingFaceEncoder(str(encoder_directory), detokenise, 1024, CPU, "cut"), bert(encoder_directory)
        embedded = model.embeddings(input_ids=torch.zeros(1, 512, dtype=torch.long))
        layer = model.encoder.layer[0]
        value = layer.attention.self.value(embedded).mean(1, keepdim=True).expand_as(embedded)
        attended = layer.attention.output(value, embedded)
        padding = layer.output(layer.intermediate(attended), attended)[0, 0]
        first = model(input_ids=torch.tensor([[2, *word_ids(sample_of(7)), 3]])).last_hidden_state[0, 0]
        torch.testing.assert_close(encoder.encode(sample_of(7)[None])[0], unit_mean([first, padding]), rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_the_layouts_agree_on_what_fills_one_window_and_differ_beyond(self, encoder_directory):
        windows = HuggingFaceEncoder(str(encoder_directory), detokenise, 512, CPU)
        cut = HuggingFaceEncoder(str(encoder_directory), detokenise, 512, CPU, "cut")
        torch.testing.assert_close(windows.encode(samples_of(5, 510)), cut.encode(samples_of(5, 510)), rtol=1e-5, atol=1e-5)
        long = samples_of(900)
        windows, cut = (HuggingFaceEncoder(str(encoder_directory), detokenise, 1024, CPU, layout) for layout in ("windows", "cut"))
        assert (windows.encode(long) - cut.encode(long)).abs().max() > 1e-2

    def test_windows_have_512_tokens_with_their_own_ends(self, encoder_directory):
        encoder = HuggingFaceEncoder(str(encoder_directory), detokenise, 2048, CPU)
        windows, owners = encoder._windows(encoder.tokenise(samples_of(511, 0, 1150, 2400)))
        assert [len(window) for window in windows] == [512, 3, 2, 512, 512, 132, 512, 512, 512, 512]
        assert owners.tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3]
        assert all(window[0] == 2 and window[-1] == 3 and not {2, 3} & set(window[1:-1].tolist()) for window in windows)

    @torch.no_grad()
    def test_an_encoder_that_reads_less_gets_smaller_windows(self, tmp_path):
        directory = write_text_encoder(tmp_path / "small", max_positions=40)
        encoder = HuggingFaceEncoder(str(directory), detokenise, 160, CPU)
        assert encoder.window_tokens == 40
        samples = samples_of(0, 38, 39, 152, 500)
        expected = [slow_windows(directory, sample, 160, size=40) for sample in samples]
        torch.testing.assert_close(encoder.encode(samples), torch.stack(expected), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("layout", ["windows", "cut"])
    def test_company_makes_no_difference(self, encoder_directory, small_passes, layout):
        encoder = HuggingFaceEncoder(str(encoder_directory), detokenise, 1024, CPU, layout)
        samples = samples_of(0, 3, 700, 40, 1022, 300)
        together = encoder.encode(samples)
        alone = torch.cat([encoder.encode(sample[None]) for sample in samples])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encoder.encode(samples.flip(0)).flip(0), together, rtol=1e-5, atol=1e-5)
        assert len({tuple(row) for row in together.tolist()}) == 6

    def test_nothing_gives_nothing(self, encoder_directory):
        assert HuggingFaceEncoder(str(encoder_directory), detokenise, 512, CPU).encode([]).shape == (0, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["windows", "cut"])
def test_on_a_gpu_features_and_gradients_are_near_those_of_the_cpu(encoder_directory, layout):
    found = []
    for device in (CPU, torch.device("cuda")):
        encoder = HuggingFaceEncoder(str(encoder_directory), detokenise, 1024, device, layout)
        features = encoder.features(encoder.tokenise(samples_of(0, 5, 600, 1200)))
        assert features.dtype == torch.float32 and features.device.type == device.type
        features[:, 0].sum().backward()
        gradient = torch.cat([value.grad.flatten() for value in encoder.parameters()])
        found.append((features.detach().cpu(), gradient.cpu()))
    for exact, low in zip(*found, strict=True):
        assert torch.nn.functional.cosine_similarity(exact.flatten(), low.flatten(), dim=0) > 0.95


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200))
def test_passes_hold_all_in_order_and_no_more_than_they_may(lengths: list[int], limit: int) -> None:
    lengths.sort()
    bounds = list(pass_bounds(np.array(lengths, dtype=np.int64), limit))
    assert [number for first, stop in bounds for number in range(first, stop)] == list(range(len(lengths)))
    for first, stop in bounds:
        assert stop - first == 1 or (stop - first) * lengths[stop - 1] <= limit
        # And each is as large as it may be.
        assert stop == len(lengths) or (stop + 1 - first) * lengths[stop] > limit


def test_parity_with_reference_numbers_from_windows_on() -> None:
    """From window vectors of any length, pooled here, to scores, loss and gradients."""
    golden = np.load(DATA / "relational.npz")
    num_samples, num_windows, dim = golden["windows"].shape
    windows = torch.from_numpy(golden["windows"]).reshape(-1, dim)
    torch.testing.assert_close(windows.norm(dim=-1), torch.ones(len(windows)))
    owners = torch.arange(num_samples).repeat_interleave(num_windows)
    shuffled = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    embedding = mean_of_windows(windows[shuffled], owners[shuffled], num_samples)
    np.testing.assert_allclose(embedding, golden["embedding"], atol=1e-6)
    model = RelationalModel(dim, dim, projection=False)
    with torch.no_grad():
        model.head_weight.copy_(torch.from_numpy(golden["head_weight"]))
        model.head_bias.copy_(torch.from_numpy(golden["head_bias"])[0])
        model.alpha.fill_(float(golden["alpha"]))
        model.tau.fill_(float(golden["temperature"]))
    scores = model(embedding[None])[0]
    loss = (scores - torch.from_numpy(golden["target"])).square().mean()
    loss.backward()
    found = {
        "scores": scores.detach(),
        "loss": loss.detach(),
        "grad_alpha": model.alpha.grad,
        "grad_temperature": model.tau.grad,
        "grad_head_weight": model.head_weight.grad,
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, golden[name], atol=1e-5, err_msg=name)


class TestErrors:
    def test_what_cannot_be_loaded(self, tmp_path):
        (tmp_path / "empty").mkdir()
        for name in ("no-such-encoder", "empty"):
            message = (
                rf"relational\.encoder: cannot load '\S+{name}' \(.+\); give a Hugging Face encoder's name, a local directory, or 'probe'"
            )
            with pytest.raises(UserError, match=message):
                HuggingFaceEncoder(str(tmp_path / name), detokenise, 512, CPU)

    @pytest.mark.parametrize("token", ["cls_token", "sep_token", "pad_token"])
    def test_a_tokenizer_without_special_tokens(self, encoder_directory, tmp_path, token):
        directory = shutil.copytree(encoder_directory, tmp_path / "encoder")
        kept = json.loads((directory / "tokenizer_config.json").read_text())
        del kept[token]
        (directory / "tokenizer_config.json").write_text(json.dumps(kept))
        (directory / "special_tokens_map.json").unlink(missing_ok=True)
        with pytest.raises(UserError, match=r"the tokenizer of '\S+' has no \[CLS\], \[SEP\] or \[PAD\] token; choose a BERT-like encoder"):
            HuggingFaceEncoder(str(directory), detokenise, 512, CPU)

    def test_layouts_and_sizes_that_do_not_fit(self, encoder_directory, tmp_path):
        name = str(encoder_directory)
        with pytest.raises(UserError, match="encoder_layout is 'stripes'; choose one of windows, cut"):
            HuggingFaceEncoder(name, detokenise, 512, CPU, "stripes")
        with pytest.raises(UserError, match="encoder_max_tokens: 700 is not a multiple of 512, which encoder_layout=cut needs"):
            HuggingFaceEncoder(name, detokenise, 700, CPU, "cut")
        small = str(write_text_encoder(tmp_path / "small", max_positions=40))
        with pytest.raises(UserError, match=r"cut makes windows of 512 tokens, '\S+small' reads 40; use windows"):
            HuggingFaceEncoder(small, detokenise, 512, CPU, "cut")
        least = str(write_text_encoder(tmp_path / "least", max_positions=2))
        with pytest.raises(UserError, match=r"'\S+least' reads 2 tokens at once; a window needs \[CLS\], \[SEP\] and text"):
            HuggingFaceEncoder(least, detokenise, 512, CPU)

    def test_a_directory_without_a_trained_encoder(self, encoder_directory):
        with pytest.raises(UserError, match=r"no trained text encoder in \S+: it has no text_encoder\.json; fit the model again"):
            HuggingFaceEncoder.load(encoder_directory, detokenise, CPU)


class Texts:
    """Sixty short texts whose influence is the order of two words in them, in rollouts; remembers what was read."""

    def __init__(self, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        words = generator.integers(2, len(WORDS), (60, 6))
        self.influence = generator.choice([-1.0, 1.0], 60)
        for row, sign in zip(words, self.influence, strict=True):
            # Red before green is good, green before red is bad: which words there are tells nothing.
            row[np.sort(generator.permutation(6)[:2])] = (0, 1) if sign < 0 else (1, 0)
        self.samples = torch.from_numpy(words)
        self.rollouts = np.stack([generator.permutation(60)[:4] for _ in range(120)])
        self.labels = self.influence[self.rollouts] + 0.1 * generator.standard_normal((120, 4))
        self.read: list[int] = []

    def read_samples(self, numbers: np.ndarray) -> torch.Tensor:
        self.read.extend(numbers.tolist())
        return self.samples[torch.from_numpy(numbers)]

    def source(self, directory: Path) -> TrainedFeatures:
        return TrainedFeatures(HuggingFaceEncoder(str(directory), detokenise, 64, CPU), self.read_samples)


FIT = FitSettings(
    embedding_dim=None,
    relation="additive",
    learning_rate=3e-3,
    weight_decay=0.01,
    warmup_steps=10,
    epochs=6,
    batch_rollouts=4,
    max_refits=0,
)
SHORT_FIT = dataclasses.replace(FIT, epochs=2)


def fitted(directory: Path, fit: FitSettings = FIT, group: Any = None) -> tuple[FitResult, TrainedFeatures]:
    texts = Texts()
    source = texts.source(directory)
    return fit_relational(source, texts.rollouts, texts.labels, fit, 3, group), source


def fitted_in_ranks(rank: int, world_size: int, directory: str) -> tuple[list[float], dict[str, Any]]:
    result, source = fitted(Path(directory), SHORT_FIT, torch.distributed.group.WORLD)
    return source(torch.arange(60)).detach().flatten().tolist(), result.report["relational"]


class TestTraining:
    @pytest.fixture(scope="class")
    def trained(self, encoder_directory):
        return fitted(encoder_directory)

    def test_learns_what_the_frozen_encoder_does_not_show(self, trained, encoder_directory):
        result, _ = trained
        texts = Texts()
        table = HuggingFaceEncoder(str(encoder_directory), detokenise, 64, CPU).encode(texts.samples)
        frozen = fit_relational(table, texts.rollouts, texts.labels, FIT, 3).report["relational"]
        assert result.model is not None
        assert result.report["relational"]["spearman"] > 0.5 > 0.3 > frozen["spearman"]
        assert result.report["relational"]["mse"] < 0.6 * frozen["mse"]

    def test_is_deterministic(self, encoder_directory):
        torch.manual_seed(1)
        first, source = fitted(encoder_directory, SHORT_FIT)
        torch.manual_seed(2)
        second, again = fitted(encoder_directory, SHORT_FIT)
        assert first.report == second.report
        assert torch.equal(source(torch.arange(60)), again(torch.arange(60)))

    def test_two_ranks_equal_one(self, encoder_directory, tmp_path):
        one, source = fitted(encoder_directory, SHORT_FIT)
        two = run_ranks(fitted_in_ranks, 2, str(encoder_directory), tmp_path=tmp_path)
        assert two[0] == two[1] and one.model is not None
        np.testing.assert_allclose(two[0][0], source(torch.arange(60)).detach().flatten(), rtol=1e-3, atol=1e-4)
        assert two[0][1] == pytest.approx(one.report["relational"], rel=1e-3, abs=1e-3)

    def test_lowers_the_loss_with_every_parameter_in_use(self, encoder_directory):
        texts = Texts()
        source = texts.source(encoder_directory)
        before = [value.detach().clone() for value in source.parameters()]
        targets = torch.from_numpy(texts.influence).float()
        optimizer = torch.optim.AdamW(source.parameters(), lr=3e-3)
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = (3 * source(torch.arange(60))[:, 0] - targets).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        assert all(not torch.equal(value, old) for value, old in zip(source.parameters(), before, strict=True))

    def test_features_keep_shape_and_place_and_texts_are_read_once(self, encoder_directory):
        texts = Texts()
        source = texts.source(encoder_directory)
        numbers = torch.tensor([[5, 3, 5], [0, 59, 3]])
        features = source(numbers)
        assert features.shape == (2, 3, source.feature_dim) and features.requires_grad
        expected = source.encoder.encode(texts.samples[numbers.flatten()]).view(2, 3, -1)
        torch.testing.assert_close(features.detach(), expected, rtol=1e-5, atol=1e-5)
        source(torch.tensor([3, 7]))
        assert texts.read == [0, 3, 5, 59, 7]
        with torch.no_grad():
            assert not source(numbers).requires_grad

    def test_gradients_do_not_depend_on_the_passes(self, encoder_directory, monkeypatch):
        found = []
        for limit, calls in ((4096, 1), (16, 30)):
            monkeypatch.setitem(text_encoder._TOKENS_PER_PASS, "cpu", limit)
            source = Texts().source(encoder_directory)
            passes: list[int] = []
            whole = source.encoder._forward
            source.encoder._forward = lambda *given, whole=whole, passes=passes: passes.append(1) or whole(*given)  # type: ignore[method-assign]
            loss = (source(torch.arange(60)) * torch.linspace(-1, 1, 16)).square().sum()
            assert len(passes) == calls
            loss.backward()
            # Each of several passes is computed again on the way back.
            assert len(passes) == calls * (1 if calls == 1 else 2)
            found.append([loss.detach(), *(value.grad for value in source.parameters())])
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("layout", ["windows", "cut"])
    def test_gradients_equal_those_of_the_slow_version(self, encoder_directory, layout, small_passes):
        encoder = HuggingFaceEncoder(str(encoder_directory), detokenise, 1024, CPU, layout)
        samples = samples_of(3, 600)
        encoder.features(encoder.tokenise(samples)).sum(-1).square().sum().backward()
        model = bert(encoder_directory)
        ids = [word_ids(sample) for sample in samples]
        if layout == "windows":
            inputs = [[[2, *ids[0], 3]], [[2, *ids[1][:510], 3], [2, *ids[1][510:], 3]]]
            rows = [[model(input_ids=torch.tensor([window])) for window in windows] for windows in inputs]
        else:
            rows = []
            for text in ids:
                padded = [2, *text, 3] + [0] * (1022 - len(text))
                mask = [1] * (len(text) + 2) + [0] * (1022 - len(text))
                given = torch.tensor(padded).view(2, 1, 512), torch.tensor(mask).view(2, 1, 512)
                rows.append([model(input_ids=window, attention_mask=inside) for window, inside in zip(*given, strict=True)])
        features = torch.stack([unit_mean([row.last_hidden_state[0, 0] for row in windows]) for windows in rows])
        features.sum(-1).square().sum().backward()
        expected = {name: value.grad for name, value in model.named_parameters() if not name.startswith("pooler.")}
        torch.testing.assert_close([value.grad for value in encoder.parameters()], list(expected.values()), rtol=1e-3, atol=1e-4)

    def test_a_copy_is_trained_by_itself(self, encoder_directory):
        encoder = HuggingFaceEncoder(str(encoder_directory), detokenise, 64, CPU)
        before, other = encoder.encode(Texts().samples), encoder.copy()
        with torch.no_grad():
            for value in other.parameters():
                value.add_(0.1)
        assert torch.equal(encoder.encode(Texts().samples), before)
        assert not torch.allclose(other.encode(Texts().samples), before, atol=1e-3)

    @pytest.mark.parametrize("layout", ["windows", "cut"])
    def test_saved_and_loaded_it_predicts_the_same(self, trained, tmp_path, layout, encoder_directory, monkeypatch):
        result, source = trained
        if layout == "cut":
            source = TrainedFeatures(HuggingFaceEncoder(str(encoder_directory), detokenise, 512, CPU, "cut"), Texts().read_samples)
        assert result.model is not None
        result.model.save(tmp_path / "final", source.encoder.save)
        # Nothing is asked of a hub.
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        model = RelationalModel.load(tmp_path / "final")
        assert model.encoder_directory == tmp_path / "final" / "encoder"
        encoder = HuggingFaceEncoder.load(model.encoder_directory, detokenise, CPU)
        texts = Texts()
        with torch.no_grad():
            expected = result.model(source(torch.from_numpy(texts.rollouts)))
            found = model(encoder.encode(texts.samples)[torch.from_numpy(texts.rollouts)])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert (tmp_path / "final" / "encoder" / "model.safetensors").is_file()
        # A loaded one can be trained on and kept again.
        encoder.save(tmp_path / "again")
        kept = [json.loads((directory / "text_encoder.json").read_text()) for directory in (tmp_path / "again", model.encoder_directory)]
        assert kept[0] == kept[1] and kept[0]["encoder"] == str(encoder_directory) and kept[0]["layout"] == layout
