"""The store: results named by their content, found by what they were made from.

    objects/<digest>          an immutable directory tree, named by the SHA-256 of its listing
    actions/<stage>/<fp>/     manifest.json, the commit point; prefect.json, Prefect's cache record of the same action
    work/<stage>/<fp>/        scratch of an action being built (flock): resumable, deletable
    runs/<recipe>/            which actions a run used
    format                    version of this layout

A remote (`remote.py` has its layout) is where stores of machines with separate disks meet: a bucket, or a directory that all see. What it
has is a HIT; an object is pulled when something reads it, and pushed when it has been built.

Map, each file knowing only those before it
    digest.py  disk.py  manifest.py  layout.py     bytes, writing, records, the version of the layout and its migrations
    patience.py  workspace.py  local.py            waiting, locks, the store of this machine
    places.py  remote.py  transfer.py              bytes elsewhere, the remote, files on their way
    sharing.py  lease.py                           one action between the two; who builds it
    store.py  maintenance.py                       what everybody uses; fsck and gc

Words: a *digest* names bytes, a *fingerprint* names an intent (stage, code version, config, digests of the inputs), an *object* is a
tree of bytes, an *action* ties a fingerprint to an object, a *workspace* is where an action is being built.

Key contracts
- An action exists exactly when its manifest does, and then its object is whole. A crash at any point leaves a miss and a workspace.
- First writer wins; a second writer of the same bytes changes nothing.
- Objects are never written to after they are published. Files in them are read-only and may be hard-linked into other objects.
- The kernel frees a workspace's lock when its holder dies, whatever killed it. Others wait for the holder and take its result.
- With a remote: files, then the manifest. First writer wins there too, and everybody uses what won; a refresh that is newer replaces it.
- Nothing that comes from elsewhere is believed before its digest is right, and no path of it leaves its folder.

Never: imports torch or Prefect, compares the clocks of machines for a lock, deletes without being asked.
"""

from pesc.store.manifest import ArtifactRef, Manifest
from pesc.store.store import Store

__all__ = ["ArtifactRef", "Manifest", "Store"]
