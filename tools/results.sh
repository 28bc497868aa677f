#!/usr/bin/env bash
# Every figure of what the model inside the package draws, in the README, its card and docs/evaluation.md, and one page of
# them all. An hour on two cores; killed, the same command goes on where it was: only references and the second stage's
# measures, ten minutes, are drawn anew.
#   bash tools/results.sh [FOLDER]        FOLDER: results.  N=10 asks for ten held-out classes instead of a hundred.
source "$(dirname "$0")/environment.sh"

make_environment
install_radt "[eval]"
need_font

out=${1:-results} n=${N:-100}
radt() {
  local said=$out/last-$BASHPID.txt # a lane each
  say "radt $*"
  .venv/bin/radt "$@" >"$said" || stop "that command failed; what it said is above and in $said"
  rm "$said"
}
bench() {
  local folder=$1
  shift
  radt evaluate emoji-draw --kb "$out/kb" -n "$n" --batch-size 8 --out "$out/$folder" "$@"
}
# captions of a corpus of tars, one a line
captions() { for tar in "$1"/*.tar; do tar -xf "$tar" --wildcards '*.txt' --to-command='cat; echo'; done; }

# Two lanes of one thread each: faster than one of two.
first_lane() {
  # what is drawn, by kind of prompt: with retrieval, without, with one neighbour wrong
  bench kinds --kinds all
  bench fast --kinds all --stages 1 --fast
  # one thing at a time
  bench text-share --sweep text-share --kinds ground,two -n $((n / 2 + n % 2))
  bench by --sweep by --kinds ground
  bench text-share-6 --sweep text-share --kinds ground,two -n $((n / 2 + n % 2)) --stages 1 --steps 10 \
    --text-guidance 6 --neighbor-guidance 6
  bench neighbors-8 --sweep neighbors --kinds ground -k 8 --stages 1
}
second_lane() {
  bench small --kinds all --stages 1
  bench neighbors --sweep neighbors --kinds ground -k 2
  bench k --sweep k --kinds ground
  bench new-entity --new-entity --kinds ground
  # things from outside the font
  radt corpus drawings "$out/drawings"
  radt evaluate references "$out/drawings" --out "$out/references"
  radt evaluate references "$out/drawings" --stages 1 --out "$out/references-small"
  # what the second stage adds to the first one's pictures
  say "tools/bench_upscaling.py"
  .venv/bin/python tools/bench_upscaling.py --kb "$out/kb" --out "$out/upscaling" -n "$n" --levels 0
  # distances to true scenes of held-out emoji, with retrieval and without
  local scenes=$((3 * n))
  radt corpus emoji-scenes "$out/asked-$scenes" --num "$scenes" --split heldout --seed 1
  radt corpus emoji-scenes "$out/scenes-$scenes" --num "$scenes" --split heldout --seed 2
  captions "$out/asked-$scenes" >"$out/prompts-$scenes.txt"
  radt generate --prompts "$out/prompts-$scenes.txt" --kb "$out/kb" --batch-size 8 --out "$out/drawn-$scenes"
  radt generate --prompts "$out/prompts-$scenes.txt" -k 0 --batch-size 8 --out "$out/drawn-without-$scenes"
  radt evaluate images "$out/asked-$scenes" --extractor recognizer --metrics soa --out "$out/images-true"
  for set in drawn drawn-without; do
    radt evaluate images "$out/$set-$scenes" --real "$out/scenes-$scenes" --extractor recognizer --out "$out/images-$set"
  done
}

mkdir -p "$out"
radt corpus emoji "$out/emoji"
radt index build "$out/emoji" --kb "$out/kb"
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
first_lane &
first=$!
second_lane &
second=$!
failed=
wait "$first" || failed=1
wait "$second" || failed=1
[ -z "$failed" ] || stop "not everything was measured; run it again, it goes on where it was"
radt report "$out" --out "$out/page"
printf '\nopen %s\n' "$out/page/report.html"
