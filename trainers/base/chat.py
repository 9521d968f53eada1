"""Chat prompts, and chat templates: programs that come with a tokenizer, and may never end."""

import signal
import threading
from typing import Any

from transformers import PreTrainedTokenizerBase


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, each with a role and a content."""
    return isinstance(prompt, list) and all(isinstance(turn, dict) and "role" in turn for turn in prompt)


# Far more than any messages take.
SECONDS = 60.0


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, messages: list, **options: Any) -> Any:
    """As the tokenizer's own; a TimeoutError where it takes longer than SECONDS. Only in the main thread, since signals
    reach no other."""
    if threading.current_thread() is not threading.main_thread():
        return tokenizer.apply_chat_template(messages, **options)

    def interrupt(*_: Any) -> None:
        raise TimeoutError(f"the chat template has not ended after {SECONDS:g} s")

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        return tokenizer.apply_chat_template(messages, **options)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
