"""The store: results named by their content, found by what they were made from.

    objects/<digest>          an immutable directory tree, named by the SHA-256 of its listing
    actions/<stage>/<fp>/     manifest.json, the commit point; prefect.json, Prefect's cache record of the same action
    work/<stage>/<fp>/        scratch of an action being built (flock): resumable, deletable
    runs/<recipe>/            which actions a run used

Words: a *digest* names bytes, a *fingerprint* names an intent (stage, code version, config, digests of the inputs), an *object* is a
tree of bytes, an *action* ties a fingerprint to an object, a *workspace* is where an action is being built.

Key contracts
- An action exists exactly when its manifest does, and then its object is whole. A crash at any point leaves a miss and a workspace.
- First writer wins; a second writer of the same bytes changes nothing.
- Objects are never written to after they are published. Files in them are read-only and may be hard-linked into other objects.
- The kernel frees a workspace's lock when its holder dies, whatever killed it.

Never: imports torch or Prefect, reads the clock for a decision, deletes without being asked.
"""

from pesc.store.manifest import ArtifactRef, Manifest
from pesc.store.store import Store

__all__ = ["ArtifactRef", "Manifest", "Store"]
