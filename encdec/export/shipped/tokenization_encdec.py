"""encdec's tokenizer for transformers: special tokens of labels and inputs differ."""

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


class EncdecTokenizer(PreTrainedTokenizerFast):
    """A tokenizer.json whose template frames inputs; labels are a text's ids and EOS."""

    def _switch_to_target_mode(self):
        self._of_inputs = self.backend_tokenizer.post_processor
        eos = self.eos_token
        self.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {eos}", pair=f"$A $B {eos}", special_tokens=[(eos, self.eos_token_id)]
        )

    def _switch_to_input_mode(self):
        if getattr(self, "_of_inputs", None) is not None:
            self.backend_tokenizer.post_processor, self._of_inputs = self._of_inputs, None
