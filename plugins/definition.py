"""An operator as a graph knows it: an ONNX function of a domain of our own, whose body is standard operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "zimg"
OPSET = 23


class Definition(NamedTuple):
    """A function in ONNX's text form (https://onnx.ai/onnx/repo-docs/Syntax.html), and where it may stand.

    Its last output is what a place in a graph is found by; those before it are values on the way that others read too.
    """

    name: str
    attributes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: tuple[str, ...]
    shared: tuple[str, ...] = ()
    """Operators of the body whose results others may read too; they are computed again."""
    alike: tuple[str, ...] = ()
    """Inputs and outputs of one shape (batch, tokens, width), where the operators of the body would take others too."""

    @property
    def text(self) -> str:
        """The whole function."""
        head = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n{self.name}'
        attributes = f" <{', '.join(self.attributes)}>" if self.attributes else ""
        ends = f" ({', '.join(self.inputs)}) => ({', '.join(self.outputs)})"
        return head + attributes + ends + "\n{\n" + "\n".join(self.body) + "\n}"

    def function(self) -> ir.Function:
        """The function, made anew."""
        import onnx.parser
        import onnx_ir as ir

        return ir.serde.deserialize_function(onnx.parser.parse_function(self.text))
