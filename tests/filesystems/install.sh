#!/usr/bin/env bash
# What run.py makes file systems with: Debian's packages.
set -euo pipefail
packages=(xfsprogs btrfs-progs squashfs-tools erofs-utils bindfs sshfs openssh-sftp-server fuse3 fuse-overlayfs fuse2fs
    ntfs-3g mergerfs gocryptfs)
missing=no
for tool in mkfs.xfs mkfs.btrfs mksquashfs mkfs.erofs bindfs sshfs fuse-overlayfs fuse2fs ntfs-3g mergerfs gocryptfs; do
    command -v "$tool" >/dev/null || missing=$tool
done
if [ "$missing" != no ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
fi
