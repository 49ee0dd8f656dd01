package api_test

import (
	"os"
	"testing"

	"github.com/wrenn-sandbox/wrenn/internal/controlplane/store/storetest"
)

func TestMain(m *testing.M) { os.Exit(storetest.Run(m)) }
