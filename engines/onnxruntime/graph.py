"""A bundle's graph as ONNX Runtime takes it, wherever the bundle's files lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zimgkit.engines.bundle import Bundle

FOLDER = "session.model_external_initializers_file_folder_path"


def given(bundle: Bundle, graph: str, options: Any) -> str | bytes:
    """What a session is made from: the graph's path, or where files of the bundle are links to elsewhere, its bytes.

    ONNX Runtime refuses weights behind links that leave the graph's folder. In the bytes they have the paths that the
    links lead to, below the root of the file system, and so are mapped like any others.

    Args:
        bundle: an open bundle.
        graph: the file of one of its graphs.
        options: ``onnxruntime.SessionOptions`` of the session, to which the folder is added.

    Raises:
        BundleError: the graph is broken, or points into a file that the manifest does not list.
    """
    path = bundle.file(graph)
    if not bundle.linked:
        return str(path)
    root = path.resolve().anchor
    options.add_session_config_entry(FOLDER, root)
    return bundle.located(graph, lambda file: bundle.file(file).resolve().relative_to(root).as_posix())
