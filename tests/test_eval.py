import math

import pytest
import torch

from kivi_tvm.eval import agreement, decoded_logits, perplexity


def test_equal_logits_agree():
    logits = torch.randn(5, 11)
    assert agreement(logits, logits.clone()) == (1.0, 0.0, 5)


def test_against_numbers_worked_out_by_hand():
    # Two positions over two tokens: p = (3/4, 1/4) against q = (1/4, 3/4), then p = q.
    p = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
    q = torch.tensor([[1.0, 3.0], [1.0, 1.0]]).log()
    result = agreement(p, q)
    assert result.top1 == 0.5
    assert result.kl == pytest.approx(0.5 * math.log(3) / 2, rel=1e-6)


def test_direction_is_from_the_reference():
    p = torch.tensor([[9.0, 1.0]]).log()
    q = torch.tensor([[5.0, 5.0]]).log()
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert agreement(p, q).kl == pytest.approx(forward, rel=1e-6)
    assert agreement(q, p).kl == pytest.approx(backward, rel=1e-6)


def test_adding_a_constant_changes_nothing():
    p, q = torch.randn(4, 7), torch.randn(4, 7)
    assert agreement(p + 50, q - 50).kl == pytest.approx(agreement(p, q).kl, rel=1e-4)


def test_tokens_that_the_reference_rules_out_add_nothing():
    p = torch.tensor([[0.0, 0.0, -math.inf]])
    assert agreement(p, p).kl == 0
    assert agreement(p, torch.zeros(1, 3)).kl == pytest.approx(math.log(1.5))


def test_tokens_that_only_the_other_rules_out_are_infinitely_bad():
    assert agreement(torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]])).kl == math.inf


@pytest.mark.parametrize("shapes", [((2, 3), (3, 3)), ((3,), (3,)), ((0, 3), (0, 3))])
def test_shapes_are_checked(shapes):
    with pytest.raises(ValueError) as caught:
        agreement(*map(torch.zeros, shapes))
    assert "`reference_logits`" in str(caught.value) and str(list(shapes[0])) in str(caught.value)


def test_many_positions_are_averaged_as_one():
    p, q = torch.randn(2, 150, 7)
    whole = agreement(p, q)
    kl = torch.nn.functional.kl_div(
        q.double().log_softmax(-1),
        p.double().log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    assert whole.kl == pytest.approx(kl.item())
    assert whole.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()


class Counting:
    """A model whose logits name the token it saw and how many came before it."""

    def __init__(self):
        self.calls = []

    def __call__(self, tokens, past_key_values, logits_to_keep=0):
        self.calls.append(tokens.tolist()[0])
        past_key_values += tokens.tolist()[0]
        logits = torch.tensor([[[float(tokens[0, -1]), float(len(past_key_values))]]])
        return type("Output", (), {"logits": logits})


def test_decoding_is_teacher_forced_one_token_at_a_time():
    model = Counting()
    logits = decoded_logits(model, [], torch.tensor([[7, 8, 9, 5, 6]]), positions=2)
    assert model.calls == [[7, 8, 9], [5], [6]]
    assert logits.tolist() == [[5, 4], [6, 5]]


@pytest.mark.parametrize("positions", [0, 3, 9])
def test_positions_leave_a_prompt(positions):
    with pytest.raises(ValueError) as caught:
        decoded_logits(Counting(), [], torch.tensor([[1, 2, 3]]), positions)
    assert str(caught.value) == f"`positions` must be in 1..2, got {positions}"


class Guessing:
    """A model of three tokens that gives the next of the cycle 0, 1, 2 half of the mass."""

    def __call__(self, tokens, past_key_values, logits_to_keep=0):
        logits = torch.full((1, 1, 3), 0.25).log()
        logits[0, 0, (tokens[0, -1] + 1) % 3] = math.log(0.5)
        return type("Output", (), {"logits": logits})


def test_perplexity_is_of_the_token_after_each_step():
    scored = perplexity(Guessing(), None, torch.tensor([[2, 2, 0, 1, 2, 0]]), positions=4)
    assert scored.perplexity == pytest.approx(2)
    assert scored.logits.shape == (4, 3)
    # The last token breaks the cycle: three predictions with probability 1/2, one with 1/4.
    scored = perplexity(Guessing(), None, torch.tensor([[2, 2, 0, 1, 2, 1]]), positions=4)
    assert scored.perplexity == pytest.approx(2 ** (5 / 4))


def test_perplexity_leaves_a_prompt_and_a_last_token():
    with pytest.raises(ValueError) as caught:
        perplexity(Guessing(), None, torch.tensor([[1, 2, 0]]), positions=2)
    assert str(caught.value) == "`positions` must be in 1..1, got 2"
