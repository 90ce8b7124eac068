"""A model for the commands that need one."""

import pytest

WORDS = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(93))]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with a random Llama of 512 tokens of context and a tokenizer of whole words."""
    from hf.tiny import tiny_llama
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(max_position_embeddings=512).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
