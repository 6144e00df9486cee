"""A plugin of vLLM: squared-ReLU networks of its models run 2:4 where a call has enough tokens.

vLLM finds it by the entry point ``vllm.general_plugins`` of this distribution, in each of its processes. Nothing
happens unless the environment variable ``SPARSE24_VLLM`` is 1 (`sparse24.vllm.settings`). Then each model is searched
once its weights are loaded (`sparse24.vllm.loading`): a module that computes ``down_proj(relu2(up_proj(x)))`` with
vLLM's linear layers gets a forward that calls one op (`sparse24.vllm.operator`) and leaves collectives to the layers
(`sparse24.vllm.layers`). The op decides at each call: with few tokens it runs vLLM's own products, otherwise ours
(`sparse24.vllm.network`).
"""

from sparse24.vllm.settings import Settings

__all__ = ["register"]


def register() -> None:
    """Install the plugin: vLLM calls this at its start, in each process and possibly more than once.

    Raises
    ------
    RuntimeError
        A variable has a value that means nothing: ``sparse24.vllm: expected <variable> <rule>, got <value>``.
    """
    settings = Settings.of_environment()
    if settings is not None:
        from sparse24.vllm.loading import install  # lazy: imports vLLM

        install(settings)
