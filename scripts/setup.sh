#!/usr/bin/env bash
# Installs what the commands of this repository need, and writes the file $1 when all of it is there.
set -euo pipefail
stamp=$1

# --- System libraries: video decoding (FFmpeg), rendering without a screen or a GPU (OSMesa, EGL), and what OpenCV
# links to (GL, GLib).
libraries=$(/sbin/ldconfig -p)
packages=()
[[ $libraries == *libavcodec.so* ]] || packages+=(ffmpeg)
[[ $libraries == *libOSMesa.so* ]] || packages+=(libosmesa6)
[[ $libraries == *libEGL.so* ]] || packages+=(libegl1)
[[ $libraries == *libGL.so* ]] || packages+=(libgl1)
[[ $libraries == *libgthread-2.0.so* ]] || packages+=(libglib2.0-0)
if ((${#packages[@]})); then
    sudo=()
    [[ $(id -u) == 0 ]] || sudo=(sudo -n)
    install="apt-get update -qq && apt-get install -y -qq --no-install-recommends ${packages[*]}"
    echo "Installing system libraries: ${packages[*]}"
    if ! "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive sh -c "$install" >/dev/null; then
        echo "Could not install ${packages[*]}. Rendering or fast video decoding will not work until somebody runs" >&2
        echo "    sudo sh -c '$install'" >&2
    fi
fi

# --- Python. Reusing an environment keeps a second setup short.
is_recent='import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))'
if ! .venv/bin/python -c "$is_recent" 2>/dev/null; then
    python=
    for candidate in python3.12 python3 python; do
        if "$candidate" -c "$is_recent" 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [[ -z $python ]]; then
        echo "Found no Python >= 3.12 with venv as python3.12, python3 or python. One of these brings it:" >&2
        echo "    sudo apt-get install python3.12-venv    (Ubuntu 24.04; on Debian 13: python3-venv)" >&2
        echo "    pyenv install 3.12" >&2
        echo "    conda create -n python312 python=3.12 && conda activate python312" >&2
        exit 1
    fi
    echo "Creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

# --- Packages.
echo "Installing Python packages into .venv: 6 GB, 3 to 10 minutes the first time"
.venv/bin/pip install -qq --disable-pip-version-check -r requirements.txt
touch "$stamp"
echo "Setup is complete."
