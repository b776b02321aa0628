"""Responses of several assistant turns: which text and which tokens are the assistant's.

    prompt | assistant | user | assistant         a dialogue, or an agent's calls with the results of its tools
             ^^^^^^^^^          ^^^^^^^^^          response tokens: log-probabilities, token rewards, key tokens
                         ----                     context: read, neither scored nor trained

The response tokens of all turns stand one after the other in `chosen_ids` and `rejected_ids`. The columns
`chosen_context_ids` and `chosen_context_at` hold the tokens between them, and the number of response tokens before
each; `forward/packing.py` puts both together. So every reader of response tokens counts, ranks and sums the
assistant's tokens alone.

A turn is found by rendering the conversation up to it, as for a single response (`chat.py`). This must be the beginning
of the whole conversation, or the whole conversation must have the turn's text and an end after the same opening: many
templates write something else around the last turn (an empty thought). Otherwise the row is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from sepo.data.chat import ChatWriter, Response, Way, Written, common_start, is_in, parts
from sepo.data.messages import DropRow, Message
from sepo.errors import one_line

if TYPE_CHECKING:
    from sepo.data.encoding import Encoder

_TURNS = "a response has several assistant turns: the turns between them are read, but neither scored nor trained"
_REWRITTEN = "the chat template writes an earlier assistant turn otherwise than the last (without an empty thought?)"


def write_turns(
    writer: ChatWriter, context: list[Message], sides: tuple[list[Message], list[Message]], way: Way
) -> Written:
    """Render a pair of responses with several assistant turns.

    Args:
        context: guarded messages before the responses.
        sides: guarded messages of both responses.

    Raises:
        DropRow: as `ChatWriter.write`, or a turn cannot be found in the rendered conversation.
    """
    try:
        chosen, rejected = (_written_side(writer, context, side, way) for side in sides)
    except DropRow:
        raise
    except Exception as error:  # a template may raise any exception
        raise DropRow("refused by the chat template", one_line(error)[:100]) from None
    prompt = common_start(chosen.prompt, rejected.prompt, writer.template.control)
    if not all(is_in(part, prompt) for message in context for part in parts(message, thinking=False)):
        raise DropRow("two prompts")
    first, second = ([side.prompt[len(prompt) :], *side.segments[1:]] for side in (chosen, rejected))
    notes = tuple(dict.fromkeys((_TURNS, *chosen.notes, *rejected.notes)))
    return Written(prompt, "".join(first), "".join(second), notes, (first, second))


class _Side(NamedTuple):
    """The text before a response, and the response as in `Written.segments`."""

    prompt: str
    segments: list[str]
    notes: list[str]


def _written_side(writer: ChatWriter, context: list[Message], side: list[Message], way: Way) -> _Side:
    """Render one response, and find its assistant turns."""
    responses = {index: _as_last(writer, [*context, *side[: index + 1]], way) for index in _assistant_turns(side)}
    *earlier, last = responses
    whole = responses[last].before + responses[last].text
    spans = [_span(writer, whole, responses[index], side[index]) for index in earlier]
    spans.append((len(responses[last].before), len(whole), responses[last].note))
    # The text before, between and behind the turns, and the turns.
    edges = [0, *(edge for start, stop, _ in spans for edge in (start, stop))]
    if edges != sorted(edges):
        raise DropRow("several turns", "the chat template changes the order of the turns")
    pieces = [whole[start:stop] for start, stop in pairwise(edges)]
    for (turn, following), piece in zip(pairwise(responses), pieces[2::2], strict=True):
        if not all(is_in(part, piece) for message in side[turn + 1 : following] for part in parts(message)):
            raise DropRow("several turns", "a turn between them is not where it was said")
    writer.check_all_is_written([*context, *side[:last]], responses[last].before, way)
    notes = [note for *_, note in spans if note]
    return _Side(pieces[0], ["", *pieces[1:]], notes)


def _assistant_turns(side: Sequence[Message]) -> list[int]:
    return [index for index, message in enumerate(side) if message["role"] == "assistant"]


def _as_last(writer: ChatWriter, messages: list[Message], way: Way) -> Response:
    """The last message as a response to the messages before it."""
    *before, message = messages
    return writer.response(before, "", writer.render(before, way, add_generation_prompt=True), message, way)


def _span(writer: ChatWriter, whole: str, response: Response, message: Message) -> tuple[int, int, str]:
    """Where an earlier assistant turn starts and stops in the whole conversation, and a note.

    Args:
        response: the turn as the last of a conversation.
    """
    start = len(response.before)
    if whole.startswith(response.before + response.text):
        return start, start + len(response.text), response.note
    if not whole.startswith(response.before):
        start = len(common_start(whole, response.before, writer.template.control))
    content = message["content"]
    for form in dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip())):
        stop = start + len(form)
        if form.strip() and message.keys() == {"role", "content"} and whole.startswith(form, start):
            if whole.startswith(writer.template.kept_end, stop):
                return start, stop + len(writer.template.kept_end), _REWRITTEN
            if writer.template.control.match(whole, stop):  # an end that no model writes before the next turn
                return start, stop, _REWRITTEN
    raise DropRow("several turns", "the chat template changes an earlier turn (its thinking?)")


class Turns(NamedTuple):
    """A response as token ids: the assistant's tokens, and those between them with the number of tokens before each."""

    ids: list[int]
    context_ids: list[int]
    context_at: list[int]


def ids_of_turns(encoder: Encoder, prompt: str, segments: Sequence[str]) -> Turns:
    """Tokenise a response of several turns; each segment as a response to the text before it (`Encoder.ids_of`).

    Raises:
        DropRow: a turn has no token, or control tokens of the text are not those of the ids.
    """
    joint = encoder.encode(list(accumulate(segments, initial=prompt)))
    turns = Turns([], [], [])
    for number, (text, (before, after)) in enumerate(zip(segments, pairwise(joint), strict=True)):
        keeps = after[: len(before)] == before
        ids = after[len(before) :] if keeps else encoder.encode_alone(text)
        encoder.check_control_ids(ids, text)
        if number % 2:
            if not ids:
                raise DropRow("no response")
            turns.ids.extend(ids)
        else:
            turns.context_ids.extend(ids)
            turns.context_at.extend([len(turns.ids)] * len(ids))
    turns.ids.extend(encoder.chat_tail)
    return turns
