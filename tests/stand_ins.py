"""Programs that stand in for others on PATH, and what was said to them."""


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


def said(tools):
    return (tools / "said").read_text()
