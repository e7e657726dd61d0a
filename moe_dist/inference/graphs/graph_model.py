"""A graph with the `forward` of the model that it was made of, whatever runs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from moe_dist.conversion.heads import asked_rows, read_heads
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.inference.backends.answers_only import AnswersOnly
from moe_dist.inference.graphs.tracing import TASK_IDS, GraphSpec
from moe_dist.moe.routing import CHOSEN_TASK, current_context

Run = Callable[[list[str], dict[str, Tensor]], Mapping[str, Tensor]]
"""Outputs by name, of those that are asked for, from inputs by name."""


class GraphModel(AnswersOnly):
    """In the place of a model: its configuration and its `forward`, answered by a graph.

    Args:
        model: that the graph was made of; it is not kept.
        run: runs the graph.
        spec: what the graph reads and gives.
    """

    def __init__(self, model: Any, run: Run, spec: GraphSpec) -> None:
        super().__init__()
        self.config = model.config
        self._run = run
        self._spec = spec
        chosen = getattr(model, CHOSEN_TASK, None)
        if chosen is not None:
            setattr(self, CHOSEN_TASK, chosen)
        # Architectures, and whoever times them, ask for the device and dtype of the weights.
        self._placeholder = nn.Parameter(torch.empty(0), requires_grad=False)
        self.eval()

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self._placeholder.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the outputs."""
        return self._placeholder.dtype

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to be saved, as its state is."""
        self.state_dict()

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a graph has no key-value cache."""
        raise ConversionError(
            f"the {self.form} form gives the logits of a pass, and has no cache to write texts "
            "with",
            remedy="use the eager or the lean form",
        )

    def answer(self, given: Mapping[str, Any]) -> Any:
        """Run the graph on the arguments of a forward call, by name."""
        inputs = self._inputs(given)
        names = [name for name in self._spec.outputs if name in self._own_outputs]
        found = dict(self._run(names, inputs))
        if read_heads(self) and getattr(self, CHOSEN_TASK, None) is None:
            found["logits"] = found["logits"][..., asked_rows(self)]
        output = self._spec.output_class(**found)
        return output if given.get("return_dict") is not False else output.to_tuple()

    @property
    def _own_outputs(self) -> set[str]:
        return set(inspect.signature(self._spec.output_class).parameters)

    def _inputs(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Bring a call's arguments into what the graph reads, or say what it does not take."""
        known = (*self._spec.inputs, "token_type_ids", "return_dict")
        strange = [
            name
            for name, value in given.items()
            if value is not None and value is not False and name not in known
        ]
        ids = given.get("input_ids")
        if strange or ids is None:
            wrong = f"was given {', '.join(strange)}" if strange else "was given no input_ids"
            raise MissingInputError(
                f"the {self.form} form of {type(self).__name__} reads "
                f"{', '.join(self._spec.inputs)}, and {wrong}",
                remedy="leave out what it does not read, or use the eager form",
            )
        mask = given.get("attention_mask")
        kinds = given.get("token_type_ids")
        if mask is not None and mask.shape != ids.shape:
            raise MissingInputError(
                f"the {self.form} form takes an attention_mask of the shape {tuple(ids.shape)} of "
                f"the input_ids, and was given {tuple(mask.shape)}",
                remedy="give one number for each token, or use the eager form",
            )
        if not (ids.shape[1] and (mask is None or bool(mask.any(dim=1).all()))):
            raise MissingInputError(
                f"a text has no tokens, of which the {self.form} form gives other answers than the "
                "model",
                remedy="leave empty texts out, or use the eager form",
            )
        if "token_type_ids" not in self._spec.inputs and kinds is not None:
            self._check_kinds(kinds)
        values = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids) if mask is None else mask,
            "token_type_ids": torch.zeros_like(ids) if kinds is None else kinds,
        }
        values |= self._tasks(len(ids))
        return {name: values[name].long() for name in self._spec.inputs}

    def _check_kinds(self, kinds: Tensor) -> None:
        """See that kinds of texts, of which the model knows one or none, say nothing."""
        num_kinds = getattr(self.config, "type_vocab_size", None)
        if num_kinds is None or (num_kinds and bool(kinds.any())):
            raise MissingInputError(
                f"{type(self).__name__} tells no kinds of texts apart in the {self.form} form",
                remedy="leave token_type_ids out",
            )

    def _tasks(self, num_samples: int) -> dict[str, Tensor]:
        """The task of each sample, where one was named: that which was chosen, and no other."""
        context = current_context()
        task_ids = None if context is None else context.task_ids
        chosen = getattr(self, CHOSEN_TASK, None)
        if chosen is not None and task_ids is not None and bool((task_ids != chosen).any()):
            raise MissingInputError(
                f"the graph was made for the task {chosen}, and this call names "
                f"{sorted(set(task_ids.tolist()))}",
                remedy="load the model without a task, or for the task that is wanted",
            )
        if TASK_IDS not in self._spec.inputs:
            return {}
        if task_ids is None:
            raise MissingInputError(
                "the routers choose by the task, and this forward call names none",
                remedy="load the model with load_model(directory, task=NAME), or call it inside "
                "use_task(NUMBER)",
            )
        return {TASK_IDS: task_ids.reshape(-1).expand(num_samples)}


def graph_model(model: Any, form: str, run: Run, spec: GraphSpec) -> GraphModel:
    """Make one of a class with the name, by which kinds of tasks know a model, and the arguments.

    Args:
        model: that the graph was made of.
        form: the graph's, in an error's words.
        run: runs the graph.
        spec: what the graph reads and gives.

    Returns:
        What answers in the model's place.
    """
    kind = type(model)
    signature = inspect.signature(kind.forward)

    def forward(self: GraphModel, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        given = dict(list(bound.items())[1:])
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        return self.answer(given)

    vars(forward)["__signature__"] = signature
    members = {"form": form, "forward": forward, "__module__": __name__}
    made: GraphModel = type(kind.__name__, (GraphModel,), members)(model, run, spec)
    return made
