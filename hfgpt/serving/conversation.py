"""A conversation with a model, limited to its context: in the terminal, on the page, and in the demo."""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from hfgpt.data.templates import check_chat_template, encode_chat
from hfgpt.errors import InputError
from hfgpt.evaluation.generation import SamplingArguments, generate_ids


class RecordingStreamer:
    """Forwards and records the tokens of an answer: if it is interrupted, `generate` returns nothing.

    Args:
        streamer: Receives everything from `generate`, first the prompt.
    """

    def __init__(self, streamer: TextStreamer):
        self.streamer, self._received = streamer, []

    @property
    def ids(self) -> list[int]:
        """The tokens of the answer so far."""
        return [token for values in self._received[1:] for token in values]

    def put(self, value: torch.Tensor):
        self._received.append(value.flatten().tolist())
        self.streamer.put(value)

    def end(self):
        self.streamer.end()


@dataclass
class Chat:
    """A conversation that never exceeds the model's context: its oldest turns are dropped first.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, with a chat template and an end-of-text token.
        sampling: Sampling settings; `max_new_tokens` is per answer, None: a quarter of the context.
        messages: The messages so far, without the system prompt.
        system: System prompt; None: no system message.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: SamplingArguments
    messages: list[dict[str, str]] = field(default_factory=list)
    system: str | None = None

    def __post_init__(self):
        if not self.tokenizer.chat_template:
            raise InputError(
                "the tokenizer has no chat template, so the model was not trained to chat: train it with task: "
                "instruct, or use hfgpt generate"
            )
        if self.tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end-of-text token, so answers would never end: use another model")
        check_chat_template(self.tokenizer)
        if self.max_new_tokens >= self.model.config.max_position_embeddings:
            raise InputError(
                f"--max-new-tokens is {self.max_new_tokens}, which leaves no room for a question in the context of "
                f"{self.model.config.max_position_embeddings}: lower it"
            )
        torch.manual_seed(self.sampling.seed)

    @property
    def max_new_tokens(self) -> int:
        return self.sampling.max_new_tokens or max(self.model.config.max_position_embeddings // 4, 1)

    def reset(self):
        """Clears the history; the system prompt is kept."""
        self.messages.clear()

    def answer(self, text: str, streamer: TextStreamer | None = None) -> str:
        """Sends a message to the model.

        An answer interrupted with Ctrl-C is kept as far as it was streamed, so that the user can ask the model to
        continue. A message whose answer had not started is not kept.

        Args:
            text: The message.
            streamer: Receives the tokens of the answer as they are generated.

        Returns:
            The answer.

        Raises:
            KeyboardInterrupt: Ctrl-C interrupted the answer; text buffered by the streamer has been printed.
            InputError: The message contains a special token, or leaves no room for an answer even without history; it
                is not kept.
        """
        if special := [token for token in self.tokenizer.all_special_tokens if token in text]:
            raise InputError(f"the message contains the special token {special[0]}: remove it")
        question = {"role": "user", "content": text}
        ids = self._fit([*self.messages, question])
        prompt = torch.tensor([ids], device=self.model.device)
        sampling = {"do_sample": False}
        if not self.sampling.greedy:
            names = ("temperature", "top_k", "top_p")
            sampling = {"do_sample": True, **{name: getattr(self.sampling, name) for name in names}}
        end = self.tokenizer.eos_token_id
        recorder = RecordingStreamer(streamer) if streamer else None
        try:
            generated = generate_ids(
                self.model,
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.max_new_tokens,
                eos_token_id=end,
                pad_token_id=end,
                streamer=recorder,
                **sampling,
            )
        except KeyboardInterrupt:
            if recorder:
                self._remember(question, recorder.ids)
                recorder.end()
            raise
        return self._remember(question, generated[0, len(ids) :])

    def _remember(self, question: dict[str, str], ids: torch.Tensor | list[int]) -> str:
        """Adds a question and its answer to the conversation; returns the answer."""
        answer = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        # An empty answer is not kept: the template would have no text to end.
        self.messages += [question, {"role": "assistant", "content": answer}] if answer else []
        return answer

    def _fit(self, messages: list[dict[str, str]]) -> list[int]:
        """The token ids of the latest messages that leave room for an answer; drops the older ones."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        room = self.model.config.max_position_embeddings - self.max_new_tokens
        while True:
            ids = encode_chat(self.tokenizer, [*system, *messages], add_generation_prompt=True)["input_ids"]
            if len(ids) <= room:
                self.messages = messages[:-1]
                return ids
            if len(messages) == 1:
                raise InputError(
                    f"the message has {len(ids)} tokens with its template, but the context only has room for {room} "
                    f"and an answer of {self.max_new_tokens}: shorten it, or lower --max-new-tokens"
                )
            messages = messages[2:]
