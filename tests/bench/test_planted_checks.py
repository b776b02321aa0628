"""Planted tasks: the check finds what the maker planted, and nothing else, in texts and in tokens."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from properties import examples
from sepo.bench.credit.checks import CHECKS, DETAILS
from sepo.bench.credit.tasks import TASKS, Sizes, make_task
from sepo.evaluate.gold import gold_reward
from sepo.evaluate.words import token_values
from tiny_models import tiny_tokenizer


@pytest.mark.parametrize("task", TASKS)
@given(seed=st.integers(0, 10**6))
@examples(60)
def test_an_answer_without_wrong_steps_has_the_highest_reward(task, seed):
    rng = np.random.default_rng(seed)
    question, answer = TASKS[task](rng)
    checked = CHECKS[task](question, answer(rng, 0.0))
    assert checked.reward == 1
    assert set(checked.values.values()) == {1.0}


@pytest.mark.parametrize("task", TASKS)
@given(seed=st.integers(0, 10**6))
@examples(60)
def test_a_wrong_step_lowers_the_reward_and_what_follows_from_it_does_not(task, seed):
    rng = np.random.default_rng(seed)
    question, answer = TASKS[task](rng)
    text = answer(rng, 0.3)
    checked = CHECKS[task](question, text)
    wrong = [text[slice(*at)] for at, value in checked.values.items() if value < 0]
    # An independent count of the wrong steps, by the answer's own words.
    if task == "arithmetic":
        steps = re.findall(r"(\d+) ([-+x]) (\d+) = (\d+)", text)
        right = [int(result) == eval(f"{a}{sign.replace('x', '*')}{b}") for a, sign, b, result in steps]
        assert checked.reward == np.mean(right)
        assert len(wrong) == len(right) - sum(right)
    elif task == "tracking":
        assert len(wrong) == round(4 * (1 - checked.reward))  # a false move puts one thing into a wrong box
    else:
        notes = question.partition("Notes:")[2]
        told = [value for values in DETAILS.values() for value in values if re.search(rf"\b{value}\b", text)]
        false = [value for value in told if not re.search(rf"\b{value}\b", notes)]
        assert sorted(wrong) == sorted(false)
        assert checked.reward == max((len(told) - 2 * len(false)) / 4, -1)


@pytest.mark.parametrize("task", TASKS)
@given(question=st.text(max_size=80), answer=st.text(max_size=120))
@examples(60)
def test_any_text_has_a_reward_in_range_and_units_in_order(task, question, answer):
    gold = gold_reward(task)
    assert -1 <= gold.scores([question], [answer])[0] <= 1
    units = list(gold.truth(question, answer))
    assert all(a.stop <= b.start for a, b in pairwise(units))


def test_tokens_carry_the_value_of_their_step():
    tokenizer = tiny_tokenizer()  # one token a character
    text = "14 + 5 = 18; 18 - 8 = 10."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    truth = gold_reward("arithmetic").truth
    values = token_values(tokenizer, ids, truth, "Start with 14. Add 5. Subtract 8.")
    assert "".join("-" if v < 0 else "+" if v > 0 else "0" if v == 0 else " " for v in values) == (
        "00 0 0 0 --  00 0 0 0 ++ "
    )


def test_the_pairs_of_a_task_follow_from_its_seed_and_share_no_question():
    sizes = Sizes(train=12, held_out=6, demos=10)
    task, again = make_task("details", sizes), make_task("details", sizes)
    assert task == again
    assert make_task("details", sizes, seed=1) != task
    train, held_out = ({row["prompt"][0]["content"] for row in rows} for rows in (task.train, task.held_out))
    asked = {question for question, _ in task.demos}
    assert not train & held_out
    assert not (train | held_out) & asked
    assert all(abs(row["chosen_gold"] - row["rejected_gold"]) >= sizes.gap for row in task.train)
