//go:build linux

package uffd

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const fileSize = 16 * blockPages * pageSize

func TestRegionsOfAHostileVMMAreRefused(t *testing.T) {
	t.Parallel()
	for name, said := range map[string]string{
		"nothing":                    ``,
		"no list":                    `{"base_host_virt_addr":4096,"size":4096,"offset":0}`,
		"an empty list":              `[]`,
		"no size":                    `[{"base_host_virt_addr":4096,"offset":0}]`,
		"a part of a page":           `[{"base_host_virt_addr":4096,"size":4097,"offset":0}]`,
		"an address within a page":   `[{"base_host_virt_addr":4097,"size":4096,"offset":0}]`,
		"an offset within a page":    `[{"base_host_virt_addr":4096,"size":4096,"offset":1}]`,
		"a negative offset":          `[{"base_host_virt_addr":4096,"size":4096,"offset":-4096}]`,
		"more than the file":         `[{"base_host_virt_addr":4096,"size":1052672,"offset":0}]`,
		"beyond the file":            `[{"base_host_virt_addr":4096,"size":4096,"offset":1048576}]`,
		"beyond the file, going on":  `[{"base_host_virt_addr":4096,"size":8192,"offset":1044480}]`,
		"an offset that wraps":       `[{"base_host_virt_addr":4096,"size":8192,"offset":18446744073709547520}]`,
		"an address that wraps":      `[{"base_host_virt_addr":18446744073709547520,"size":8192,"offset":0}]`,
		"a size that is no number":   `[{"base_host_virt_addr":4096,"size":1e99,"offset":0}]`,
		"addresses that overlap":     `[{"base_host_virt_addr":4096,"size":8192,"offset":0},{"base_host_virt_addr":8192,"size":8192,"offset":8192}]`,
		"offsets that overlap":       `[{"base_host_virt_addr":4096,"size":8192,"offset":0},{"base_host_virt_addr":65536,"size":8192,"offset":4096}]`,
		"the same region twice":      `[{"base_host_virt_addr":4096,"size":8192,"offset":0},{"base_host_virt_addr":4096,"size":8192,"offset":0}]`,
		"huge pages":                 `[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":2097152,"page_size_kib":2097152}]`,
		"huge pages of old releases": `[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size_kib":2048}]`,
		"pages of four bytes":        `[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4}]`,
		"very many": "[" + strings.Repeat(`{"base_host_virt_addr":4096,"size":4096,"offset":0},`, maxRegions) +
			`{"base_host_virt_addr":4096,"size":4096,"offset":0}]`,
	} {
		if got, err := parseRegions([]byte(said), fileSize); err == nil {
			t.Errorf("%s: taken as %+v", name, got)
		}
	}
}

func TestRegionsOfEveryReleaseAreRead(t *testing.T) {
	t.Parallel()
	want := []region{{4096, 8192, 0}, {1 << 32, 57344, 8192}}
	for _, page := range []string{``, `,"page_size_kib":4`, `,"page_size_kib":4096`, `,"page_size":4096,"page_size_kib":4096`} {
		said := `[{"base_host_virt_addr":4096,"size":8192,"offset":0` + page + `},{"base_host_virt_addr":4294967296,"size":57344,"offset":8192` + page + `}]`
		if got, err := parseRegions([]byte(said), fileSize); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %+v, %v", page, got, err)
		}
	}
}

// FuzzRegions holds what is taken against what was promised: whole pages of the file, each of them once.
func FuzzRegions(f *testing.F) {
	f.Add([]byte(`[{"base_host_virt_addr":4096,"size":8192,"offset":0},{"base_host_virt_addr":65536,"size":8192,"offset":8192}]`))
	f.Add([]byte(`[{"base_host_virt_addr":4096,"size":8192,"offset":18446744073709547520}]`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		all, err := parseRegions(raw, fileSize)
		if err != nil {
			return
		}
		var total uint64
		for _, r := range all {
			first, last := r.cut(0, ^uint64(0))
			if last*pageSize > fileSize || (last-first)*pageSize != r.size || r.base+r.size < r.base {
				t.Fatalf("%+v is taken as pages %d to %d", r, first, last)
			}
			total += r.size
		}
		if total > fileSize {
			t.Fatalf("%+v are larger than the file", all)
		}
	})
}

func TestARangeIsCutToTheRegion(t *testing.T) {
	t.Parallel()
	r := region{base: 10 * pageSize, size: 4 * pageSize, offset: 2 * pageSize}
	for _, c := range [][4]uint64{ // start, end, first page, last page
		{10 * pageSize, 11 * pageSize, 2, 3}, {0, 100 * pageSize, 2, 6}, {13 * pageSize, 15 * pageSize, 5, 6},
		{0, 10 * pageSize, 0, 0}, {14 * pageSize, 20 * pageSize, 0, 0}, {12 * pageSize, 11 * pageSize, 0, 0},
	} {
		if first, last := r.cut(c[0], c[1]); first != c[2] || last != c[3] {
			t.Errorf("%d to %d: pages %d to %d, want %d to %d", c[0], c[1], first, last, c[2], c[3])
		}
	}
}

func TestDamagedTouchesAreNone(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "touches")
	f, write := openTouches(path, fileSize)
	if f == nil || !write {
		t.Fatal("a new file is not written")
	}
	if other, _ := openTouches(path, fileSize); other != nil {
		t.Error("two note their touches in one file")
	}
	noted := &touches{file: f, memory: fileSize}
	for _, block := range []uint64{9, 3, 15, 0, 1} { // the last is one too many
		noted.add(block)
	}
	if err := noted.save(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if f, write = openTouches(path, fileSize); f == nil || write {
		t.Fatal("what was noted is not used")
	}
	f.Close()
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := readTouches(bytes.NewReader(good), fileSize); err != nil || !slices.Equal(got, []uint32{9, 3, 15, 0}) {
		t.Errorf("%v, %v", got, err)
	}
	for at := range good {
		bad := bytes.Clone(good)
		bad[at] ^= 0x40
		if got, err := readTouches(bytes.NewReader(bad), fileSize); err == nil {
			t.Errorf("with another byte %d: %v", at, got)
		}
		if got, err := readTouches(bytes.NewReader(good[:at]), fileSize); err == nil {
			t.Errorf("cut off at %d: %v", at, got)
		}
	}
	if _, err := readTouches(bytes.NewReader(good), 2*fileSize); err == nil {
		t.Error("touches of another memory file are used")
	}
}

func TestRunsHaveEveryBlock(t *testing.T) {
	t.Parallel()
	const blocks = 3000
	var touched []uint32
	for block := range uint32(blocks) {
		touched = append(touched, block*7%blocks)
	}
	seen := newBitmap(blocks * blockPages)
	for _, r := range runs(touched) {
		if r.end-r.first > runMost {
			t.Errorf("a run of %d pages", r.end-r.first)
		}
		seen.setAll(r.first, r.end)
	}
	for page := range uint64(blocks * blockPages) {
		if !seen.has(page) {
			t.Fatalf("page %d is missing", page)
		}
	}
}
