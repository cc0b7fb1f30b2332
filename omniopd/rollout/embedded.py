"""The embedded engine: rollouts from the learner's own model, in process. For small models and one device."""

from __future__ import annotations

from collections.abc import Sequence

from omniopd.config import RolloutConfig
from omniopd.errors import RolloutError
from omniopd.generation import Sampler, SampleRequest
from omniopd.learner.policy import Policy
from omniopd.rollout.detokenize import Detokenizer
from omniopd.types import Prompt, Rollout


class EmbeddedEngine:
    """Shares the weights with the learner, so a push moves nothing and only advances the version."""

    def __init__(self, policy: Policy, config: RolloutConfig) -> None:
        self._policy = policy
        self._config = config
        self._sampler = Sampler(policy.model, policy.tokenizer)
        self._detokenize = Detokenizer(policy.tokenizer)
        self._version = 0

    @property
    def policy_version(self) -> int:
        return self._version

    async def generate(
        self, prompts: Sequence[Prompt], *, group_size: int, seeds: Sequence[int], tag: str
    ) -> list[Rollout]:
        requests = [
            SampleRequest(
                token_ids=prompt.token_ids,
                num_samples=group_size,
                max_tokens=self._config.max_tokens,
                temperature=self._config.temperature,
                top_p=self._config.top_p,
                seed=seed,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        with self._policy.autocast():
            groups = self._sampler.sample(requests, batch_size=self._config.batch_size)
        rollouts = []
        for place, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
            for index, sample in enumerate(group):
                text, char_starts = self._detokenize(sample.token_ids)
                rollouts.append(
                    Rollout(
                        id=f"{tag}/{place}/{index}",
                        prompt=prompt,
                        group_index=index,
                        token_ids=sample.token_ids,
                        text=text,
                        char_starts=char_starts,
                        finish_reason=sample.finish_reason,
                        policy_version=self._version,
                        sampler_logprobs=sample.logprobs,
                        entropies=sample.entropies,
                    )
                )
        return rollouts

    async def push_weights(self, version: int) -> None:
        if version < self._version:
            raise RolloutError(f"weights of version {version} came after version {self._version}; versions only grow")
        self._version = version

    async def aclose(self) -> None:
        return None
