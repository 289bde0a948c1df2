"""What a tool answered is in the record, also of a conversation: Rel reads it."""

from rome.data.formats.conversation import Call, Conversation, Message
from rome.data.formats.render import render
from rome.data.relevance import irrelevant_turns
from rome.model.tokenizer import TINY, Tokenizer


def page(number):
    call = Call("shell", f'{{"command": "sed -n {number},{number + 9}p harbor.log"}}')
    return Message("assistant", "", calls=(call,))


def test_pages_with_other_answers_are_relevant_and_the_same_page_again_is_not():
    messages = [Message("user", "Sum the numbers in harbor.log.")]
    for number, answer in ((1, "17"), (11, "29"), (11, "29"), (21, "3")):
        messages += [page(number), Message("tool", answer)]
    messages.append(Message("assistant", "78"))
    trajectory = render(Conversation(tuple(messages)), Tokenizer.load(TINY))
    assert [chunk.observation for chunk in trajectory.chunks] == ["17", "29", "29", "3", ""]
    assert irrelevant_turns(trajectory) == {2: "duplicates"}
