"""Text of single tokens, and selection of the steps to write."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch

from megatron_aspo.batch import Prompt, Sample
from megatron_aspo.config.loss import PolicyLossConfig
from megatron_aspo.config.training import TrainConfig
from megatron_aspo.data.problem import Content
from megatron_aspo.policy.sample_log import is_logged, records, token_columns, token_pieces


class Bytes:
    """A tokenizer of UTF-8 bytes that drops a leading space of the text, as SentencePiece does."""

    vocab_size, eos_ids, pad_id = 256, (0,), 0

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def encode_prompt(self, content: Content) -> tuple[int, ...]:
        return self.encode(str(content))

    def decode(self, token_ids: Iterable[int], special: bool = False) -> str:
        assert special
        return bytes(token_ids).decode(errors="replace").removeprefix(" ")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (b"", []),
        (b"a b", ["a", " ", "b"]),
        ("aé€😀.".encode(), ["a", "", "é", "", "", "€", "", "", "", "😀", "."]),
        (b"a\xff\xffbc", ["a", "", "", "\ufffd\ufffdb", "c"]),  # invalid UTF-8: shown with the next character
        (b"\xf0\x9f", ["", "\ufffd"]),  # cut inside a character
        (b"\xff" * 6, ["", "", "", "\ufffd" * 4, "", "\ufffd" * 2]),
    ],
)
def test_pieces_of_text(text: bytes, pieces: list[str]) -> None:
    tokenizer = Bytes()
    assert token_pieces(tuple(text), tokenizer) == pieces
    assert "".join(pieces) == tokenizer.decode(text, special=True)


@pytest.mark.parametrize(("every", "steps"), [(0, [25]), (1, list(range(1, 26))), (10, [10, 20, 25])])
def test_logged_steps(every: int, steps: list[int]) -> None:
    train = TrainConfig(steps=25, log_samples_every=every)
    assert [step for step in range(1, 26) if is_logged(step, train)] == steps


def test_lines_by_hand() -> None:
    samples = [
        Sample(
            Prompt(3, "one", (1,), {}),
            3,
            np.array([97, 98]),
            "stop",
            text="ab",
            score=1.0,
            reward=0.5,
            advantage=1.0,
            weight_version=2,
            versions=np.array([2, 5], np.int32),
        ),
        Sample(Prompt(3, "one", (1,), {}), 3, np.array([99]), "length", text="c", advantage=-1.0, weight_version=4),
        Sample(Prompt(5, "two", (1,), {}), 5, np.array([]), "stop", advantage=1.0),
    ]
    old = torch.tensor([[-1.0, -1.0], [-1.0, 0.0], [0.0, 0.0]])
    logs = torch.tensor([[0.5, -2.0], [1.5, 0.0], [0.0, 0.0]]).log().nan_to_num(0, 0, 0)  # log r, 0 after the end
    logs[0, 1] = torch.tensor(0.25).log()
    table = torch.stack([old, old + logs, torch.ones(3, 2)])
    columns = token_columns(samples, table, PolicyLossConfig(dual_clip=3.0))
    first, second = records(20, samples, columns, Bytes())
    assert (first["step"], first["group"], first["prompt"], len(first["responses"])) == (20, 3, "one", 2)
    assert (second["step"], second["group"], second["prompt"]) == (20, 5, "two")
    up, down = first["responses"]
    assert up["tokens"] == ["a", "b"]
    assert up["ratio"] == pytest.approx([0.5, 0.25])
    assert up["weight"] == pytest.approx([2.0, 3.0])  # flipped, and held at the dual clip
    assert (up["versions"], down["versions"]) == ([[2, 1], [5, 1]], [[4, 1]])
    assert (up["hard_clipped"], up["soft_clipped"]) == ([], [1])
    assert up["logprob"] == pytest.approx([-1.6931, -2.3863], abs=1e-4)
    assert up["entropy"] == [1.0, 1.0]
    assert {key: up[key] for key in ("text", "score", "reward", "advantage", "finish_reason")} == {
        "text": "ab",
        "score": 1.0,
        "reward": 0.5,
        "advantage": 1.0,
        "finish_reason": "stop",
    }
    assert (down["tokens"], down["finish_reason"], down["weight"]) == (["c"], "length", pytest.approx([1.5]))
    assert second["responses"][0]["tokens"] == second["responses"][0]["ratio"] == []
