"""A model card as a base has it, with fields that are carried over and others."""

CARD = """---
base_model: somebody/else
license: other
license_name: llama3.1
license_link: https://example.org/LICENSE?v=1#terms
language:
- en
- no
library_name: transformers
pipeline_tag: text-generation
datasets: org/corpus
tags:
- conversational
model-index:
- name: x
  results: [{task: {type: y}}]
extra_gated_prompt: >-
  You agree

  license: mine
---

# The base

license: not in the header
"""
