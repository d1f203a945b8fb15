#!/usr/bin/env bash
# What one host of a TPU VM does; launch/tpu_vm.py copies this file there and calls it.
#
#   worker.sh setup TARBALL        install encdec from the sources in TARBALL, once
#   worker.sh mount BUCKET DIR     mount a bucket, once
#   worker.sh start [ARGUMENT...]  `encdec train ARGUMENT...` in the background, if none runs
#   worker.sh state [ARGUMENT...]  prints `encdec-state: absent`, `running` or `exited CODE`; absent,
#                                  too, where a run with other arguments has ended
#   worker.sh stop                 asks it to save and leave, then insists
#   worker.sh log [LINES]          the end of its output
set -euo pipefail

home=${ENCDEC_HOME:-$HOME/encdec-run}
grace_seconds=${ENCDEC_GRACE_SECONDS:-120}
mkdir -p "$home"

setup() {
  local tarball=$1 digest uv
  digest=$(sha256sum <"$tarball")
  if [[ -f $home/installed && $(<"$home/installed") == "$digest" ]]; then
    return
  fi
  rm -rf "$home/source"
  mkdir -p "$home/source"
  tar -xzf "$tarball" -C "$home/source"
  # The image's own Python may be older than 3.11; uv brings one along.
  uv=$(command -v uv || true)
  if [[ -z $uv ]]; then
    python3 -m pip install --quiet --user uv
    uv=$HOME/.local/bin/uv
  fi
  "$uv" venv --quiet --clear --python 3.12 "$home/venv"
  "$uv" pip install --quiet --python "$home/venv/bin/python" \
    --constraint "$home/source/constraints.txt" "$home/source[tpu,gcs]"
  printf '%s\n' "$digest" >"$home/installed"
}

mount_bucket() {
  local bucket=$1 directory=$2
  if mountpoint -q "$directory"; then
    return
  fi
  if ! command -v gcsfuse >/dev/null; then
    # https://cloud.google.com/storage/docs/cloud-storage-fuse/install
    local key=/usr/share/keyrings/cloud.google.asc
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    # The first boot may still be at its own upgrades.
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse
  fi
  sudo mkdir -p "$directory"
  sudo chown "$(id -u):$(id -g)" "$directory"
  gcsfuse --implicit-dirs "$bucket" "$directory"
}

boot() {
  cat /proc/sys/kernel/random/boot_id
}

alive() {
  # After a reboot the number may be another process's.
  [[ -f $home/pid && -f $home/boot && $(<"$home/boot") == "$(boot)" ]] &&
    kill -0 "$(<"$home/pid")" 2>/dev/null
}

state() {
  if alive; then
    echo running
  elif (($#)) && [[ -f $home/arguments && $(<"$home/arguments") != "$(quoted "$@")" ]]; then
    echo absent
  elif [[ -f $home/exit ]]; then
    echo "exited $(<"$home/exit")"
  elif [[ -f $home/pid ]]; then
    echo 'exited 137' # killed before it could be noted
  else
    echo absent
  fi
}

quoted() {
  printf '%q ' "$@"
}

start() {
  if alive; then
    [[ -f $home/arguments && $(<"$home/arguments") == "$(quoted "$@")" ]] ||
      echo "training runs already, with arguments of its own; \`stop\` it to start another" >&2
    return
  fi
  rm -f "$home/exit" "$home/pid"
  quoted "$@" >"$home/arguments"
  # A session of its own, so that the end of this connection does not end it.
  setsid nohup bash "$0" run "$@" >>"$home/log" 2>&1 </dev/null &
  for _ in $(seq 50); do
    if [[ -f $home/pid ]]; then
      return
    fi
    sleep 0.1
  done
  echo "training did not start; see $home/log" >&2
  return 1
}

run() {
  # The machine's end sends SIGTERM to every process: the training saves, this one waits for it.
  local child code signalled=1
  trap 'signalled=1' TERM
  cd "$home/source"
  "$home/venv/bin/encdec" train "$@" &
  child=$!
  boot >"$home/boot"
  printf '%s\n' "$child" >"$home/pid"
  while ((signalled)); do # a signal ends the waiting, not what is waited for
    signalled=0 code=0
    wait "$child" || code=$?
  done
  printf '%s\n' "$code" >"$home/exit.partial"
  mv "$home/exit.partial" "$home/exit"
}

stop() {
  local waited=0
  if ! alive; then
    return
  fi
  kill -TERM "$(<"$home/pid")"
  while alive && ((waited < grace_seconds)); do
    sleep 1
    waited=$((waited + 1))
  done
  if alive; then
    kill -KILL "$(<"$home/pid")"
  fi
}

action=${1:?wanted setup, mount, start, state, stop or log}
shift
case $action in
setup) setup "$@" ;;
mount) mount_bucket "$@" ;;
start) start "$@" ;;
run) run "$@" ;;
state) echo "encdec-state: $(state "$@")" ;;
stop) stop ;;
log) tail -n "${1:-100}" "$home/log" ;;
*)
  echo "unknown action $action" >&2
  exit 2
  ;;
esac
