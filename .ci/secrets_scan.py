"""Look for secrets in everything that is tracked. Needs detect-secrets; prints each finding, never its value."""

from __future__ import annotations

import sys
from pathlib import Path

from detect_secrets import SecretsCollection
from detect_secrets.settings import transient_settings

ROOT = Path(__file__).resolve().parent.parent

DETECTORS = [
    *("ArtifactoryDetector", "AWSKeyDetector", "AzureStorageKeyDetector", "BasicAuthDetector", "CloudantDetector"),
    *(
        "DiscordBotTokenDetector",
        "GitHubTokenDetector",
        "GitLabTokenDetector",
        "IbmCloudIamDetector",
        "JwtTokenDetector",
    ),
    *(
        "KeywordDetector",
        "MailchimpDetector",
        "NpmDetector",
        "OpenAIDetector",
        "PrivateKeyDetector",
        "PypiTokenDetector",
    ),
    *("SendGridDetector", "SlackDetector", "SquareOAuthDetector", "StripeDetector", "TelegramBotTokenDetector"),
    "TwilioKeyDetector",
]

MADE_UP = {"Secret Keyword", "Basic Auth Credentials"}
"""What tests may hold: logins and tokens that they make up."""

TEST_KEYS = {"tests/factories/tls/for-tests-only.key"}
"""Private keys that protect nothing."""

SKIPPED = {".git", "__pycache__", "build", "dist", "node_modules"}


def files() -> list[Path]:
    """Every file that a commit could hold."""
    found = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(
            part in SKIPPED or part.startswith((".venv", ".mypy", ".ruff", ".pytest", ".import")) for part in parts
        )
        if path.is_file() and not hidden and not any(part.endswith(".egg-info") for part in parts):
            found.append(path)
    return found


def _is_a_name(value: str) -> bool:
    """Words with underscores: the name of a function that a pattern of tokens happens to fit."""
    return all(word.isalpha() and word.islower() for word in value.split("_"))


def main() -> int:
    """Status 1 if there is something that should not be there."""
    wrong, looked = [], files()
    with transient_settings({"plugins_used": [{"name": name} for name in DETECTORS]}):
        for path in looked:
            name = str(path.relative_to(ROOT))
            found = SecretsCollection(root=str(ROOT))
            found.scan_file(name)
            for _, secret in found:
                if name.startswith("tests/") and secret.type in MADE_UP:
                    continue
                if name in TEST_KEYS and secret.type == "Private Key":
                    continue
                if secret.type not in MADE_UP and _is_a_name(secret.secret_value or ""):
                    continue
                wrong.append(f"{name}:{secret.line_number}: {secret.type}")
    for line in wrong:
        print(line)
    print(f"{len(looked)} files, {len(wrong)} findings")
    return 1 if wrong or not looked else 0


if __name__ == "__main__":
    sys.exit(main())
