package undo_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/wrenn-sandbox/wrenn/internal/undo"
)

func TestRunUndoesNewestFirstOnlyOnFailure(t *testing.T) {
	t.Parallel()
	boom, broken := errors.New("boom"), errors.New("undo broken")
	for _, fail := range []error{nil, boom} {
		var got []int
		err := func() (err error) {
			var u undo.Stack
			defer u.Run(&err)
			for i := range 3 {
				u.Push(func() error {
					got = append(got, i)
					if i == 1 {
						return broken
					}
					return nil
				})
			}
			return fail
		}()
		if fail == nil && (err != nil || got != nil) {
			t.Errorf("success: err %v, undone %v", err, got)
		}
		if fail != nil && (!errors.Is(err, boom) || !errors.Is(err, broken) || !slices.Equal(got, []int{2, 1, 0})) {
			t.Errorf("failure: err %v, undone %v", err, got)
		}
	}
}
