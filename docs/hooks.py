"""Let the documentation site hold the pages that lie outside docs/, with links that work there as in the checkout.

README.md becomes the first page, the other pages keep their paths, and those of docs/ lie at the site's root. A link to
any other file of the checkout, a config or the licence, is a link to a copy of it. A link to a folder is one to its
README.md.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'SECURITY.md', 'configs/*/README.md', 'findings/README.md')
LINK = re.compile(r'(?<=\]\()(?![a-z+]+:|#)([^)\s#]+)')
# What docstrings refer to in Sphinx's way, once it is HTML.
ROLE = re.compile(r':[a-z]+:<code>~?([\w.]+)</code>')


def on_files(files, config):
    """Add the pages outside docs/, and the files that any page links to."""
    pages = {path.relative_to(ROOT).as_posix() for pattern in PAGES for path in ROOT.glob(pattern)}
    pages |= {f'docs/{file.src_uri}' for file in files.documentation_pages()}
    links = {_target(page, link) for page in pages for link in LINK.findall((ROOT / page).read_text(encoding='utf-8'))}
    for path in sorted(pages | links):
        if (ROOT / path).is_file() and files.get_file_from_path(_place(path)) is None:
            files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between paths of the checkout into links between paths of the site."""
    place = page.file.src_uri
    source = _source(place)

    def replace(link):
        target = _place(_target(source, link[1]))
        return posixpath.relpath(target, posixpath.dirname(place) or '.')

    return LINK.sub(replace, markdown)


def on_page_content(html, page, config, files):
    """Turn references of docstrings into links, where the site documents what they name."""

    def link(role):
        return f'<autoref identifier="{role[1]}" optional><code>{role[1].rpartition(".")[2]}</code></autoref>'

    return ROLE.sub(link, html)


def _target(page, link):
    """The file that a page's link leads to, as a path of the checkout."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return f'{path}/README.md' if (ROOT / path).is_dir() else path


def _place(path):
    """Where the site has a file of the checkout."""
    return 'index.md' if path == 'README.md' else path.removeprefix('docs/')


def _source(place):
    """Where the checkout has a file of the site."""
    if place == 'index.md':
        return 'README.md'
    return f'docs/{place}' if (ROOT / 'docs' / place).is_file() else place
