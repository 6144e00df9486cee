"""Random calls of the ops and of the networks, legal and not, and what must come of them. The command is tests/fuzz.py.

tensors.py     tensors that are described before they are made, so that a failing call prints as code
dice.py        random choices: sizes, dtypes, contents, layouts
calls.py       one call, and a generator of legal calls for each op
mutations.py   ways to make a call illegal, hostile or merely odd
contract.py    what each op must refuse, and what it must return otherwise
products.py    the same of the ops that multiply, where sums are exact and where they are not
experts.py     the products of experts
experts_gradients.py  those of their backward pass
networks.py    relu2_mlp, ReLU2MLP and convert
network_reference.py  what they give, and how far from it rounding may lead
judge.py       runs a call everywhere and compares
"""
