#!/bin/sh
# Unpacks Debian's Nsight Systems, and what it needs that isn't there, into a folder; root is not
# needed, and nothing else on the machine changes.
#
#   profiling/install_nsys.sh DIR
#
# Then DIR/env is to be sourced. Exit code 3: it can't be had here; the last line says why.
set -eu

cant() {
  echo "nsight-systems: $*" >&2
  exit 3
}

[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
root=$1
[ -f "$root/env" ] && exit 0
for tool in apt-get dpkg-deb; do
  command -v $tool >/dev/null || cant "$tool is not there: this is no Debian"
done
[ "$(dpkg --print-architecture)" = amd64 ] || cant "Debian has it for amd64 alone"

mkdir -p "$root"
root=$(cd "$root" && pwd)
work=$root/apt
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/deb"
# The first release of those that the machine has packages from, with the component that is wanted.
mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
  grep -v security | grep -v -e '-updates' | grep debian | head -n 1) || true
[ -n "$mirror" ] || cant "no Debian release among apt's sources"
key=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$key] $mirror main contrib non-free non-free-firmware" > "$work/sources.list"
apt() {
  apt-get -qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- \
    -o Dir::State="$work" -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" \
    -o Dir::State::status=/var/lib/dpkg/status -o APT::Sandbox::User="$(id -un)" "$@"
}
apt update 2>"$work/log" || cant "apt can't read $mirror: $(tail -n 1 "$work/log")"
apt -s --no-install-recommends install nsight-systems >"$work/plan" 2>"$work/log" ||
  cant "$(tail -n 1 "$work/log")"
missing=$(sed -n 's/^Inst \([^ ]*\) .*/\1/p' "$work/plan")
echo "$missing" | grep -qx nsight-systems || cant "$mirror has no such package"
# A driver's installer asks questions, and is not what profiling on a CPU needs.
wanted=$(echo "$missing" | grep -v -e '^nvidia-' -e '^glx-' -e '^update-glx$')
(cd "$work/deb" && apt download $wanted 2>"$work/log") || cant "$(tail -n 1 "$work/log")"
for file in "$work"/deb/*.deb; do
  dpkg-deb -x "$file" "$root"
done
rm -r "$work"

nsys=$(find "$root" -path '*target-linux-x64/nsys' | head -n 1)
[ -x "$nsys" ] || cant "the package has no target-linux-x64/nsys"
libraries=$(find "$root" -name '*.so.*' -path '*/x86_64-linux-gnu/*' -not -path '*nsight*' -exec dirname {} \; | sort -u |
  tr '\n' ':')
cat > "$root/env.part" <<END
export FLAMINGO_FAST_NSYS='$nsys'
export LD_LIBRARY_PATH="$libraries\${LD_LIBRARY_PATH:-}"
END
mv "$root/env.part" "$root/env"
