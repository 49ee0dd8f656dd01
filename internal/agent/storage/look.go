package storage

// Look tells what a directory's file system offers, without keeping anything: free bytes, and whether
// it has reflinks (tried with a small file that is removed again).
func Look(dir string) (free int64, reflinks bool, err error) {
	free, _, err = statfs(dir)
	if err != nil {
		return 0, false, err
	}
	return free, probeReflink(dir) == nil, nil
}
