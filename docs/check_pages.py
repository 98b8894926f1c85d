"""What mkdocs asks of each page: that it loads nothing from elsewhere."""

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

_LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b[^>]*\bhref=["']?((?:https?:)?//[^"'\s>]+)"""
)


def loaded_from_elsewhere(html: str) -> list[str]:
    """Addresses that a browser asks for when it shows the page. Links are not among them."""
    return [script or link for script, link in _LOADED.findall(html)]


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    found = loaded_from_elsewhere(output)
    if found:
        raise PluginError(f"{page.file.src_uri}: loads {', '.join(found)}; expected nothing")
    return output
