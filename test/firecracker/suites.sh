# Runs the staged test programs: stage, results. What they print goes to the terminal and to the end of results: how each
# part of a test ended at once, not when the whole has, for the machine may break before that.
stage=$1 results=$2
export WRENN_TEST_KERNEL=$stage/kernels/vmlinuz WRENN_TEST_BIN=$stage/builds WRENN_TEST_IMAGES=$stage/images
export WRENN_TEST_GUEST=$stage/tests/guest WRENN_TEST_FIRECRACKER=$stage/firecracker AGENT_FIRECRACKER_DIR=$stage/firecracker
export WRENN_TEST_STRETCH=${WRENN_TEST_STRETCH:-1}
export AGENT_PROBE_SEC=$((10 * WRENN_TEST_STRETCH)) AGENT_WARM_VMS=1
parallel=${WRENN_TEST_PARALLEL:-2}
run() { # name, tests, tests to leave out
	echo "=== suite $1" | tee -a "$results"
	(cd "$stage/tests" && timeout $((1200 * WRENN_TEST_STRETCH)) "./$1" -test.v=test2json -test.run "$2" -test.skip "$3" -test.parallel "$parallel" -test.timeout 0 2>&1) | sed -u 's/\x16//g' | tee -a "$results"
}
